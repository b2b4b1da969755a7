"""FSDP2 sides on ranks: the prediction is what DTensor states, refits arrive, transformers' own state dicts agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from refit.bench.session import new_session
from refit.bench.sides import Side
from refit.bench.sides import build_side as build_checked_side
from refit.cli.parsing import parse
from refit.config.shape import Dtype, ModelShape
from refit.models.fsdp2.build import build_model
from refit.models.fsdp2.meshes import build_meshes
from refit.models.fsdp2.side import Fsdp2Side
from refit.models.fsdp2.weights import held_of
from refit.models.huggingface.model import materialise, meta_model
from refit.models.huggingface.weights import read_weights
from refit.models.megatron.side import MegatronSide
from refit.predict.families.names import named_model
from refit.predict.families.tables import Family
from refit.predict.fsdp2 import predict
from tests.models.huggingface.converted import converted_by_mbridge, with_joined_sections
from tests.models.huggingface.sides import CPU, FAMILY, RUN, alone, assert_verified, refit_once, unlike
from tests.predict.families.strategies import models
from tests.predict.test_fsdp2 import _splits, side
from tests.ranks.pool import RankPool

# --- The prediction --------------------------------------------------------------------------------------------------


def differences(rank: int, shape: ModelShape, sizes: dict[str, int]) -> list[str]:
    """How this rank's live DTensors differ from the prediction."""
    spec = side(**sizes)
    meshes = build_meshes(spec, CPU)
    if meshes is None:
        return []
    named = named_model(shape, Dtype.BF16)
    weights = read_weights(build_model(shape, named, meshes, spec, CPU), named, held_of)
    return unlike(predict(shape, spec), rank, weights)


@pytest.mark.no_megatron
@given(st.data())
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_the_prediction_is_what_dtensor_states(ranks: RankPool, data: st.DataObject) -> None:
    """Uneven, empty and strided shards, replicas and expert meshes, on random models of each family."""
    shape = data.draw(models())
    experts = shape.experts.num_experts if shape.experts else 1
    tp = data.draw(st.sampled_from([n for n in (1, 2, 3) if _splits(shape, n)]))
    shape = replace(shape, vocab_size=shape.vocab_size * tp)
    ep = data.draw(st.sampled_from([n for n in (1, 2) if experts % n == 0]))
    replicate = data.draw(st.sampled_from([n for n in (1, 2) if n * tp * ep <= 8]))
    shards = data.draw(st.integers(1, 8 // (replicate * tp * ep)))
    world_size = replicate * shards * tp * ep
    sizes = {"tp": tp, "ep": ep, "replicate": replicate, "first_rank": data.draw(st.integers(0, 8 - world_size))}
    found = ranks.run(differences, shape, {"world_size": world_size, **sizes})
    assert found == [[]] * 8


# --- Refits ----------------------------------------------------------------------------------------------------------


FSDP_TO_MEGATRON = ["--source-format=fsdp2", "--source-world-size=4", "--tensor-model-parallel-size=2"]
MEGATRON_TO_FSDP = ["--rl-inference-format=fsdp2", "--destination-world-size=6", "--tensor-model-parallel-size=2"]
FSDP_TO_FSDP = ["--source-format=fsdp2", "--rl-inference-format=fsdp2", "--source-world-size=3"]
FSDP_TO_FSDP += ["--rl-inference-tensor-model-parallel-size=2", "--destination-world-size=4"]
EXPERTS = ["--source-format=fsdp2", "--source-world-size=4", "--expert-model-parallel-size=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("tiny_qwen3", FSDP_TO_MEGATRON),
        ("tiny_qwen3_moe", [*MEGATRON_TO_FSDP, "--rl-inference-fsdp-replicate-size=3"]),
        (
            "tiny_qwen3_moe",
            [*FSDP_TO_FSDP, "--rl-inference-tensor-model-parallel-size=2", "--destination-world-size=4"],
        ),
        ("tiny_deepseek_v3", [*FSDP_TO_MEGATRON, "--rl-inference-pipeline-model-parallel-size=2"]),
        ("tiny_deepseek_v3", [*EXPERTS, "--fsdp-replicate-size=2", "--rl-inference-tensor-model-parallel-size=2"]),
        ("tiny_deepseek_v3", [*MEGATRON_TO_FSDP[:1], "--destination-world-size=4", "--expert-model-parallel-size=2"]),
        ("tiny_qwen3", [*FSDP_TO_MEGATRON, "--refit-mode=collocated"]),
        ("tiny_llama", [*FSDP_TO_MEGATRON, "--rl-inference-pipeline-model-parallel-size=2"]),
        ("tiny_qwen2", MEGATRON_TO_FSDP),
        ("tiny_mixtral", [*EXPERTS, "--fsdp-replicate-size=2", "--rl-inference-tensor-model-parallel-size=2"]),
        ("tiny_deepseek_v2", MEGATRON_TO_FSDP),
        (
            "tiny_minimax_m2",
            [*FSDP_TO_MEGATRON, "--num-layers=2", "--rl-inference-pipeline-model-parallel-size=2"],
        ),
        ("tiny_minimax_m2", [*MEGATRON_TO_FSDP[:-1], "--rl-inference-tensor-model-parallel-size=2"]),
        ("tiny_glm4_moe_lite", MEGATRON_TO_FSDP),
        ("tiny_gpt_oss", [*FSDP_TO_MEGATRON, "--rl-inference-expert-tensor-model-parallel-size=1"]),
        ("tiny_gpt_oss", [*MEGATRON_TO_FSDP, "--expert-tensor-parallel-size=1", "--num-query-groups=2"]),
        ("tiny_glm4_moe", FSDP_TO_MEGATRON),
        ("tiny_qwen3_next", [*FSDP_TO_MEGATRON, "--rl-inference-pipeline-model-parallel-size=2"]),
        ("tiny_qwen3_next", MEGATRON_TO_FSDP),
    ],
)
def test_refits_arrive_and_both_libraries_give_the_same_logits(ranks: RankPool, model: str, flags: list[str]) -> None:
    """In float32, so that both libraries' routers choose the same experts."""
    assert_verified(ranks, ["--model", model, *flags])


# --- Without the suite's oracle --------------------------------------------------------------------------------------


def refit_of_a_state_dict(rank: int, argv: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Fill the source from a seeded full state dict, refit. Returns it, and what the destination then holds here."""
    scenario = parse(argv).scenario
    assert dist.group.WORLD is not None
    session = new_session(scenario, CPU, dist.group.WORLD)
    source, destination = (build_checked_side(session, name) for name in ("source", "destination"))
    assert scenario.model is not None
    full = _seeded(scenario.model)
    if rank in scenario.source.ranks:
        assert isinstance(source.model, Fsdp2Side)
        assert source.model.module is not None
        options = StateDictOptions(full_state_dict=True, strict=True)
        set_model_state_dict(source.model.module, dict(full), options=options)
    refit_once(scenario, source, destination)
    return {"seeded": full, "held": _held(destination)}


def _seeded(shape: ModelShape) -> dict[str, torch.Tensor]:
    named = named_model(shape, Dtype.FP32)
    model = meta_model(shape, named, alone(Dtype.FP32))
    materialise(model, CPU)
    generator, state = torch.Generator().manual_seed(1), model.state_dict()
    for tensor in state.values():
        tensor.normal_(generator=generator)
    return dict(state)


def _held(built: Side) -> dict[str, torch.Tensor]:
    """The destination's full state dict, gathered; of a Megatron side on one rank its parameters."""
    if isinstance(built.model, MegatronSide):
        state = built.model.built.module.state_dict() if built.model.built is not None else {}
        return {name: tensor.clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    assert isinstance(built.model, Fsdp2Side)
    state = built.model.module.state_dict() if built.model.module is not None else {}
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


@pytest.mark.no_megatron
@pytest.mark.parametrize("model", FAMILY.values())
def test_a_full_state_dict_arrives_in_another_mesh(ranks: RankPool, model: str) -> None:
    flags = [
        "--source-format=fsdp2",
        "--rl-inference-format=fsdp2",
        "--source-world-size=3",
        "--destination-world-size=4",
    ]
    flags += ["--rl-inference-tensor-model-parallel-size=2", "--rl-inference-fsdp-replicate-size=2"]
    answers = ranks.run(refit_of_a_state_dict, ["--model", model, "--fp32", *RUN, *flags])
    for answer in answers[3:7]:
        assert answer["held"].keys() == answer["seeded"].keys()
        for name, expected in answer["seeded"].items():
            assert torch.equal(answer["held"][name], expected), name


@pytest.mark.parametrize("family", FAMILY)
def test_a_full_state_dict_arrives_in_megatron_as_mbridge_converts_it(ranks: RankPool, family: Family) -> None:
    argv = ["--model", FAMILY[family], "--fp32", *RUN, "--source-format=fsdp2", "--source-world-size=4"]
    answer = ranks.run(refit_of_a_state_dict, argv)[4]
    shape = parse(argv).scenario.model
    assert shape is not None
    converted = with_joined_sections(converted_by_mbridge(family, shape, answer["seeded"]))
    for name, expected in converted.items():
        assert torch.equal(answer["held"].pop(name), expected), name
    assert answer["held"] == {}
