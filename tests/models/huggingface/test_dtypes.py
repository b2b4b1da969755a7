"""Models whose library keeps some parameters in float32: they are built, trained, refitted and verified all the same.

Run with the newest transformers, whose DeepSeek-V3 has float32 routers, and with 5.17, whose has not
(`tests/transformers_floor.sh`).
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from refit.cli.parsing import parse
from refit.models.fsdp2.build import build_model
from refit.models.fsdp2.meshes import build_meshes
from refit.models.huggingface.model import meta_model
from refit.predict.families import releases
from refit.predict.families.names import named_model
from refit.results.refit import RefitResult
from refit.results.result import Result
from refit.results.status import Status
from tests.bench.test_runner import run_scenario
from tests.models.huggingface.sides import CPU, RUN
from tests.ranks.pool import RankPool

ROUTER = "decoder.layers.1.mlp.router.weight"
TRAINED = ["--measure=train-step,refit", "--seq-length=16", "--global-batch-size=8", "--micro-batch-size=2"]
TRAINED += ["--num-train-steps=1", "--num-train-warmup=1", "--source-world-size=4", "--tensor-model-parallel-size=2"]
MODEL = ["--model=tiny_deepseek_v3", *RUN]
FROM_FSDP2, TO_FSDP2, FROM_AUTOTP = "--source-format=fsdp2", "--rl-inference-format=fsdp2", "--source-format=autotp"


def router_dtype() -> str:
    """What the installed library makes of a router in a model of bfloat16."""
    scenario = parse([*MODEL, FROM_FSDP2]).scenario
    assert scenario.model is not None
    assert scenario.source.dtype is not None
    model = meta_model(scenario.model, named_model(scenario.model, scenario.source.dtype), scenario.source)
    found: torch.dtype = model.model.layers[1].mlp.gate.weight.dtype
    return str(found).removeprefix("torch.")


def verified(ranks: RankPool, *flags: str) -> RefitResult:
    answer: Result = ranks.run(run_scenario, [*MODEL, *flags])[0]
    found: Any = answer.measurements["refit"]
    assert answer.status is Status.OK
    assert found.engines["refit"].num_wrong == 0
    assert isinstance(found, RefitResult)
    return found


def casts(result: RefitResult) -> dict[str, tuple[str, str]]:
    assert result.plan is not None
    return {key: (before, after) for key, (before, after) in result.plan.casts.items()}


def test_the_tables_have_the_dtype_that_the_installed_library_gives() -> None:
    scenario = parse([*MODEL, FROM_FSDP2]).scenario
    assert scenario.model is not None
    assert scenario.source.dtype is not None
    named = named_model(scenario.model, scenario.source.dtype, release=releases.followed())
    assert named.logical[ROUTER].dtype == router_dtype()


@pytest.mark.one_megatron
@pytest.mark.parametrize("sides", [[FROM_FSDP2], pytest.param([FROM_FSDP2, TO_FSDP2], marks=pytest.mark.slow)])
def test_fsdp2_is_trained_and_refitted_and_what_is_cast_is_stated(ranks: RankPool, sides: list[str]) -> None:
    """TP2 and two shards, in bfloat16. FSDP2 would refuse a layer of mixed dtypes in the first forward pass."""
    dtype = router_dtype()
    found = casts(verified(ranks, *TRAINED, *sides, "--rl-inference-tensor-model-parallel-size=2"))
    is_cast = dtype != "bfloat16" and TO_FSDP2 not in sides
    assert found.get(ROUTER) == ((dtype, "bfloat16") if is_cast else None)
    assert all(key.endswith("mlp.router.weight") for key in found)


@pytest.mark.one_megatron
@pytest.mark.slow
def test_a_float32_router_is_refitted_from_one_in_bfloat16(ranks: RankPool) -> None:
    found = casts(
        verified(ranks, TO_FSDP2, "--destination-world-size=4", "--rl-inference-expert-model-parallel-size=2")
    )
    dtype = router_dtype()
    assert found.get(ROUTER) == (("bfloat16", dtype) if dtype != "bfloat16" else None)


@pytest.mark.one_megatron
@pytest.mark.slow
def test_autotp_is_trained_and_refitted_without_a_cast(ranks: RankPool) -> None:
    assert casts(verified(ranks, *TRAINED, FROM_AUTOTP)) == {}


def units(rank: int) -> list[str] | None:
    """The modules of a layer that `fully_shard` has made units of, on the ranks of the side."""
    scenario = parse([*MODEL, FROM_FSDP2, "--source-world-size=2"]).scenario
    assert scenario.model is not None
    assert scenario.source.dtype is not None
    meshes = build_meshes(scenario.source, CPU)
    if meshes is None:
        return None
    named = named_model(scenario.model, scenario.source.dtype)
    layer = build_model(scenario.model, named, meshes, scenario.source, CPU).model.layers[1]
    return [name for name, module in layer.named_modules() if isinstance(module, torch.distributed.fsdp.FSDPModule)]


def test_a_router_is_a_unit_of_its_own_where_it_has_to_be(ranks: RankPool) -> None:
    own = ["mlp.gate"] if router_dtype() != "bfloat16" else []
    assert sorted(ranks.run(units)[0]) == sorted(["", "mlp.experts", *own])


def run_with_other_tables(rank: int, argv: list[str], release: tuple[int, int]) -> Result:
    """A run whose tables follow another release than the one that builds the model."""
    with patch.object(releases, "installed", lambda: release):
        found: Result = run_scenario(rank, argv)
    return found


def test_a_library_that_differs_from_the_tables_is_a_fact(ranks: RankPool) -> None:
    dtype = router_dtype()
    other = (5, 23) if dtype == "float32" else (5, 24)
    answer = ranks.run(run_with_other_tables, [*MODEL, FROM_FSDP2, "--source-world-size=2"], other)[0]
    assert answer.status is Status.OK
    found = casts(answer.measurements["refit"])
    assert found.get(ROUTER) == ((dtype, "bfloat16") if dtype != "bfloat16" else None)
