"""AutoTP sides on ranks: the prediction is what DeepSpeed states, refits arrive, its own cut and gather agree."""

from __future__ import annotations

import gc
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refit.bench.session import new_session
from refit.bench.sides import build_side as build_checked_side
from refit.cli.parsing import parse
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.models.autotp.engine import _split_layers, build_engine, load_deepspeed, whole_model
from refit.models.autotp.groups import build_groups, told_to
from refit.models.autotp.side import AutotpSide
from refit.models.autotp.weights import held_of
from refit.models.huggingface.model import meta_model
from refit.models.huggingface.weights import read_weights
from refit.models.quantised import QuantisedModel
from refit.predict.autotp import predict
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.families.names import named_model
from tests.models.huggingface.sides import CPU, FAMILY, RUN, alone, assert_verified, refit_once, unlike
from tests.predict.families.strategies import models
from tests.predict.test_autotp import most_tp, side
from tests.predict.test_fsdp2 import preset
from tests.ranks.pool import RankPool


def built_engine(spec: SideSpec, shape: ModelShape, model: Any = None) -> Any:
    """A side's engine, of `model` or of uninitialised weights; None on a rank outside it."""
    groups = build_groups(spec)
    if groups is None:
        return None
    assert spec.dtype is not None
    named = named_model(shape, spec.dtype)
    model = model if model is not None else whole_model(shape, named, spec)
    return build_engine(model, shape, named, spec, groups, CPU)


# --- The prediction --------------------------------------------------------------------------------------------------


def differences(rank: int, shape: ModelShape, sizes: dict[str, Any]) -> list[str]:
    """How DeepSpeed's metadata of this rank differs from the prediction."""
    spec = side(**sizes)
    groups, engine = build_groups(spec), built_engine(spec, shape)
    if groups is None:
        return []
    weights = read_weights(engine.module, named_model(shape, Dtype.BF16), partial(held_of, tp=groups.tp))
    return unlike(predict(shape, spec), rank, weights)


@pytest.mark.no_megatron
@given(st.data())
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
def test_the_prediction_is_what_deepspeed_states(ranks: RankPool, data: st.DataObject) -> None:
    """Uneven and empty parts, tied embeddings, replicas and any first rank, on random models of each family."""
    shape = data.draw(models())
    tp = data.draw(st.integers(1, most_tp(shape, 4)))
    world_size = tp * data.draw(st.integers(1, 8 // tp))
    sizes = {
        "tp": tp,
        "first_rank": data.draw(st.integers(0, 8 - world_size)),
        "zero_stage": data.draw(st.none() | st.integers(0, 2)),
    }
    assert ranks.run(differences, shape, {"world_size": world_size, **sizes}) == [[]] * 8


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_qwen3_moe"])
def test_layers_are_split_as_the_plan_of_transformers_says(name: str) -> None:
    """What DeepSpeed would take by itself for a dense model; of experts it refuses the plan, with its reason."""
    load_deepspeed(CPU)
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter

    shape = preset(name)
    named = named_model(shape, Dtype.BF16)
    plan = meta_model(shape, named, alone(Dtype.BF16))._tp_plan
    if shape.experts is not None:
        with pytest.raises(ValueError, match=r"moe_tp_experts.*packed_colwise.*partition_config"):
            TPPlanConverter.convert(plan)
        return
    specs = TPPlanConverter.convert(plan)
    own = [(spec["patterns"][0], spec["partition_type"]) for spec in _split_layers(named, shape)]
    for block in named.blocks[1:]:
        for tensor in block.tensors:
            full = block.prefix + tensor.name
            theirs = [spec.partition_type.value for spec in specs if spec.matches(full)]
            mine = [kind for pattern, kind in own if re.match(pattern, full)]
            assert mine == [kind for kind in theirs if kind != "skip"]


# --- Refits ----------------------------------------------------------------------------------------------------------

AUTOTP = ["--source-format=autotp", "--rl-inference-format=autotp"]
TP, RL_TP = "--tensor-model-parallel-size", "--rl-inference-tensor-model-parallel-size"
FROM_AUTOTP = [AUTOTP[0], "--source-world-size=4", f"{TP}=2"]
TO_AUTOTP = [AUTOTP[1], "--destination-world-size=4", f"{RL_TP}=2"]
SHARED_RANKS = ["--refit-mode=collocated", "--source-world-size=6", f"{TP}=3", f"{RL_TP}=2"]


@pytest.mark.one_megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("tiny_qwen3", FROM_AUTOTP),
        ("tiny_deepseek_v3", [AUTOTP[1], f"{TP}=2", f"{RL_TP}=3"]),
        ("tiny_qwen3", [*AUTOTP, f"{TP}=5", f"{RL_TP}=3"]),
        ("tiny_qwen3", [*AUTOTP, *SHARED_RANKS, "--zero-stage=2"]),
        ("tiny_qwen3_moe", [*FROM_AUTOTP, "--rl-inference-format=fsdp2", "--destination-world-size=4"]),
        ("tiny_qwen3", ["--source-format=fsdp2", "--source-world-size=3", *TO_AUTOTP]),
    ],
)
def test_refits_arrive_and_both_sides_give_the_same_logits(ranks: RankPool, model: str, flags: list[str]) -> None:
    """In float32, so that both libraries' routers choose the same experts."""
    assert_verified(ranks, ["--model", model, *flags])


# --- Memory ----------------------------------------------------------------------------------------------------------


def live_storages() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors on this rank, by address. None has the address of another while both are referenced."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
    return {storage.data_ptr(): storage for each in tensors for storage in [each.untyped_storage()]}


def built_bytes(rank: int, argv: list[str]) -> dict[str, int]:
    """What building the destination has added to this rank's memory, and what a dry run says of it."""
    request = parse(argv)
    scenario = request.scenario
    assert dist.group.WORLD is not None
    session = new_session(scenario, CPU, dist.group.WORLD)
    before = live_storages()
    destination = build_checked_side(session, "destination")
    added = sum(storage.nbytes() for address, storage in live_storages().items() if address not in before)
    found = {"live": added, "predicted": 0, "buffers": 0}
    if rank in scenario.destination.ranks:
        assert isinstance(destination.model, QuantisedModel | AutotpSide)
        own = destination.model._model if isinstance(destination.model, QuantisedModel) else destination.model
        assert isinstance(own, AutotpSide)
        found["predicted"] = dry_run(scenario, DryRunOptions()).destination_bytes[rank]
        found["buffers"] = sum(buffer.nbytes for buffer in own.module.buffers())
    return found


@pytest.mark.no_megatron
@pytest.mark.parametrize("dtype", [[], ["--rl-inference-dtype=fp8-block"], ["--rl-inference-dtype=mxfp8"]])
def test_a_destination_holds_the_weights_of_a_dry_run_and_no_more(ranks: RankPool, dtype: list[str]) -> None:
    """No optimizer, no flat buffers, and no BF16 copy of what is FP8: beside the weights are rotary tables."""
    argv = ["--model=tiny_qwen3", "--kv-channels=128", "--vocab-size=500", "--refit-method=gloo", *TO_AUTOTP, *dtype]
    for answer in ranks.run(built_bytes, argv)[1:5]:
        assert answer["predicted"] > 1 << 20
        assert 0 <= answer["live"] - answer["predicted"] - answer["buffers"] < 1 << 12


# --- Without the suite's oracle, metadata and tables -----------------------------------------------------------------


def refit_of_a_state_dict(rank: int, argv: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """DeepSpeed cuts a seeded model, it is refitted, DeepSpeed gathers it: the seeded state dict and the gathered."""
    scenario = parse(argv).scenario
    assert dist.group.WORLD is not None
    assert scenario.model is not None
    session = new_session(scenario, CPU, dist.group.WORLD)
    source, destination = (build_checked_side(session, name) for name in ("source", "destination"))
    seeded = whole_model(scenario.model, named_model(scenario.model, Dtype.FP32), scenario.source)
    generator = torch.Generator().manual_seed(1)
    for tensor in seeded.state_dict().values():
        tensor.normal_(generator=generator)
    full = {name: tensor.clone() for name, tensor in seeded.state_dict().items()}
    cut = built_engine(scenario.source, scenario.model, seeded)
    assert isinstance(source.model, AutotpSide)
    if cut is not None:
        own = source.model.engine.module.state_dict()
        for name, part in cut.module.state_dict().items():
            own[name].copy_(part)
    refit_once(scenario, source, destination)
    assert isinstance(destination.model, AutotpSide)
    return {"seeded": full, "gathered": _gathered(destination.model)}


def _gathered(built: AutotpSide) -> dict[str, torch.Tensor]:
    """The side's full state dict, as DeepSpeed gathers it for a checkpoint."""
    if built.groups is None:
        return {}
    layers = load_deepspeed(CPU).module_inject.layers
    state: dict[str, torch.Tensor] = {}
    for prefix, module in built.engine.module.named_modules():
        parameters = list(module.parameters(recurse=False))
        with layers.GatherReplacedLayerParams(parameters, module, enabled=True):
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            state |= {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in tensors}
    return state


@pytest.mark.no_megatron
@pytest.mark.parametrize("model", FAMILY.values())
def test_a_full_state_dict_arrives_in_other_parts(ranks: RankPool, model: str) -> None:
    whole = most_tp(preset(model), 2) == 1
    flags = [
        *AUTOTP,
        *(["--source-world-size=2", "--destination-world-size=3"] if whole else [f"{TP}=2", f"{RL_TP}=3"]),
    ]
    answers = ranks.run(refit_of_a_state_dict, ["--model", model, "--fp32", *RUN, *flags])
    for answer in answers[2:5]:
        assert answer["seeded"].keys() <= answer["gathered"].keys()
        for name, expected in answer["seeded"].items():
            assert torch.equal(answer["gathered"][name], expected), name


# --- The engine ------------------------------------------------------------------------------------------------------


def step(rank: int, shape: ModelShape, sizes: dict[str, int]) -> dict[str, Any]:
    """A training step of this rank: ZeRO's stage, elements of the weights and of their master copies, what changed."""
    spec = side(**sizes)
    groups, engine = build_groups(spec), built_engine(spec, shape)
    if groups is None:
        return {}
    torch.manual_seed(0)
    for tensor in engine.module.state_dict().values():
        tensor.normal_(std=0.1)
    engine.optimizer.refresh_fp32_params()  # the master copies, from the weights
    parameters = list(engine.module.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    tokens = torch.arange(8).view(1, 8)
    engine.module.train()
    with told_to(load_deepspeed(CPU), groups):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    master = sum(part.numel() for part in getattr(engine.optimizer, "single_partition_of_fp32_groups", []))
    return {
        "stage": engine.zero_optimization_stage(),
        "master": master,
        "held": sum(parameter.numel() for parameter in parameters),
        "changed": not any(torch.equal(*pair) for pair in zip(parameters, before, strict=True)),
    }


@pytest.mark.no_megatron
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_the_engine_trains_and_zero_shards_its_optimizer_over_the_replicas(ranks: RankPool, zero_stage: int) -> None:
    sizes = {"world_size": 4, "tp": 2, "first_rank": 3, "zero_stage": zero_stage}
    answers = ranks.run(step, preset("tiny_qwen3"), sizes)
    for answer in answers[3:7]:
        assert (answer["stage"], answer["changed"]) == (zero_stage, True)
        assert zero_stage == 0 or abs(answer["master"] - answer["held"] / 2) < 64
