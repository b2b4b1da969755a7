"""The attention and the precision of transformers models: what is computed in which dtype, and what training gives."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch

from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.errors import UnavailableError
from refit.models.huggingface.attention import check_available
from refit.models.huggingface.autocast import autocast
from refit.models.huggingface.model import compute_rotary_buffers, materialise, meta_model
from refit.predict.families.names import named_model
from refit.predict.sides import training_bytes
from tests.models.huggingface.sides import CPU
from tests.models.huggingface.test_training import AUTOTP, EXPERTS, FSDP2, MODELS, TRAIN, norms_of, steps_of, trained
from tests.ranks.pool import RankPool

LIBRARIES = pytest.mark.parametrize(
    "library", [pytest.param(FSDP2, marks=pytest.mark.slow), AUTOTP], ids=["fsdp2", "autotp"]
)


# --- One rank ---------------------------------------------------------------------------------------------------------


def ready(*flags: str) -> tuple[Scenario, Any]:
    """A scenario on one rank, and its source's whole model with weights."""
    scenario = parse(["--model=tiny_qwen3", "--refit-method=gloo", *FSDP2, *flags]).scenario
    assert scenario.model is not None
    assert scenario.source.dtype is not None
    model = meta_model(scenario.model, named_model(scenario.model, scenario.source.dtype), scenario.source)
    materialise(model, CPU)
    compute_rotary_buffers(model, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "bias" in name)]:
            tensor.normal_(std=0.02, generator=generator)
    model.train()
    return scenario, model


def gradients(*flags: str) -> dict[str, torch.Tensor]:
    scenario, model = ready(*flags)
    tokens = torch.arange(34).view(2, 17)
    with autocast(scenario.source, CPU):
        logits = model(input_ids=tokens[:, :-1]).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_weights_and_gradients_of_autocast_are_float32() -> None:
    expected, found = gradients("--fp32"), gradients("--autocast")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype is torch.float32, name
        difference = float((gradient - expected[name]).norm() / expected[name].norm())
        assert 1e-4 < difference < 3e-2, name  # products are in bfloat16, which has 8 bits


@pytest.mark.parametrize("model", ["tiny_qwen3_moe", "tiny_deepseek_v3"])
def test_experts_and_routers_follow_autocast(model: str) -> None:
    """transformers' `grouped_mm` alone would not."""
    scenario, built = ready(f"--model={model}", "--autocast")
    seen: dict[str, torch.dtype] = {}
    layer = built.model.layers[-1].mlp
    layer.experts.act_fn.register_forward_hook(lambda *call: seen.update(experts=call[-1].dtype))
    layer.gate.register_forward_hook(lambda *call: seen.update(router=call[-1][0].dtype))
    layer.register_forward_hook(lambda *call: seen.update(layer=call[-1].dtype))
    with autocast(scenario.source, CPU):
        built(input_ids=torch.arange(8).view(1, 8))
    assert seen["experts"] is torch.bfloat16
    assert seen["layer"] is torch.float32
    assert model != "tiny_deepseek_v3" or seen["router"] is torch.bfloat16


def saved_bytes(model: Any, scenario: Scenario, seq_length: int) -> int:
    """Bytes that the forward pass of the layers keeps for the backward pass, weights apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(scenario.source, CPU):
        model(input_ids=torch.zeros(1, seq_length, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("flags", [["--attn-impl=eager"], ["--attn-impl=eager", "--fp32"], ["--autocast"]])
def test_the_estimate_counts_what_they_keep(flags: list[str]) -> None:
    """Against torch's own count, both as differences from sdpa without autocast: within 3 %."""
    steps = ["--measure=train-step", "--seq-length=256"]
    plain = [flag for flag in flags if flag == "--fp32"]
    runs = [ready(*steps, *given) for given in (plain, flags)]
    kept = [saved_bytes(model, scenario, 256) for scenario, model in runs]
    estimates = [training_bytes(scenario)[0].activation_bytes for scenario, _ in runs]
    assert estimates[1] - estimates[0] == pytest.approx(kept[1] - kept[0], rel=0.03)
    recomputed = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
    less = training_bytes(
        parse(["--model=tiny_qwen3", "--refit-method=gloo", *FSDP2, *steps, *flags, *recomputed]).scenario
    )
    assert less[0].activation_bytes < estimates[1]


def test_flash_attention_needs_cuda_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = parse([*TRAIN, *FSDP2, "--attn-impl=flash_attention_2"]).scenario
    with pytest.raises(UnavailableError, match="flash_attention_2 needs CUDA, the device is cpu: use --attn-impl sdpa"):
        check_available(scenario, CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs the module flash_attn, .* pip install flash-attn"):
        check_available(scenario, cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    check_available(scenario, cuda)
    monkeypatch.undo()
    check_available(parse([*TRAIN, *FSDP2]).scenario, CPU)


# --- Four ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.no_megatron
@pytest.mark.slow
@LIBRARIES
def test_eager_attention_takes_the_steps_of_sdpa(ranks: RankPool, library: list[str]) -> None:
    """In float32. The live model says which attention it has."""
    sdpa, eager = (steps_of(trained(ranks, "--fp32", *library, f"--attn-impl={name}")) for name in ("sdpa", "eager"))
    assert (sdpa.config["attn_implementation"], eager.config["attn_implementation"]) == ("sdpa", "eager")
    assert eager.losses == pytest.approx(sdpa.losses, rel=1e-6)
    assert norms_of(eager) == pytest.approx(norms_of(sdpa), rel=1e-4)


@pytest.mark.one_megatron
@LIBRARIES
def test_autocast_is_refitted_in_16_bits(ranks: RankPool, library: list[str]) -> None:
    """A whole cycle: losses near those of float32, and a refit that casts, verified, with the logits of training."""
    cycle = ["--measure=train-step,refit", "--refit-mode=collocated", "--num-benchmark-iterations=1"]
    single = steps_of(trained(ranks, *library, "--fp32"))
    found = trained(ranks, *library, *cycle, "--autocast")
    assert steps_of(found).losses != single.losses
    assert steps_of(found).losses == pytest.approx(single.losses, rel=1e-3)
    assert norms_of(steps_of(found))[0] == pytest.approx(norms_of(single)[0], rel=2e-2)
    assert found.refit is not None
    assert found.refit.plan is not None
    assert found.refit.model is not None
    assert set(found.refit.plan.casts.values()) == {("float32", "bfloat16")}
    tested = found.refit.tested
    assert tested is not None
    assert tested.num_wrong == 0 < tested.num_compared
    assert tested.trained is not None
    assert tested.trained.agreement == 1.0


@pytest.mark.no_megatron
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_experts_under_autocast(ranks: RankPool, model: str) -> None:
    """Experts over a mesh of their own, with recomputation, by both libraries."""
    flags = [flag for flag in EXPERTS if flag != "--fp32"] + MODELS[model] + ["--autocast"]
    again = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
    two = ["--expert-model-parallel-size=2", "--tensor-model-parallel-size=2"]
    single = steps_of(trained(ranks, *EXPERTS, *MODELS[model], *FSDP2, base=()))
    for library in ([*FSDP2, *two], [*FSDP2, *two, *again], [*AUTOTP, two[1]]):
        found = steps_of(trained(ranks, *flags, *library, base=()))
        assert found.losses == pytest.approx(single.losses, rel=2e-3)


@pytest.mark.no_megatron
@pytest.mark.slow
def test_float16_autocast_scales_its_loss(ranks: RankPool) -> None:
    single = steps_of(trained(ranks, "--fp32", *FSDP2))
    found = steps_of(trained(ranks, "--fp16", "--autocast", *FSDP2))
    assert found.losses == pytest.approx(single.losses, rel=1e-4)
    assert norms_of(found) == pytest.approx(norms_of(single), rel=2e-2)
    flags = ["--fp16", "--autocast", "--initial-loss-scale=4294967296", "--num-train-steps=1"]
    assert steps_of(trained(ranks, *flags, *FSDP2)).num_skipped == 2


@pytest.mark.no_megatron
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_autocast_at_other_stages_of_zero(ranks: RankPool, stage: int) -> None:
    whole = [*AUTOTP, "--autocast", "--tensor-model-parallel-size=1"]
    first, found = (steps_of(trained(ranks, *whole, f"--zero-stage={number}")) for number in (1, stage))
    assert found.losses == pytest.approx(first.losses, rel=1e-4)
