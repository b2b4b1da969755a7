"""Megatron-Core's own refit as the baseline: the cases it refits correctly, and its known errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from refit.bench.engines.megatron import MegatronEngine, prepare_megatron_refit
from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.shape import ModelShape
from refit.errors import RefitError, UnavailableError
from refit.models.megatron.compat import has_refit_of_absent_models
from refit.models.megatron.sharding import read_weights
from refit.predict.megatron import predict
from tests.models.megatron.small import (
    DELTA_NETS,
    LATENT,
    LATENT_EXPERTS,
    MOE,
    SEQUENTIAL,
    built,
    fill,
    layout,
    spec,
    wrong,
)
from tests.ranks.pool import RankPool

OLD = not has_refit_of_absent_models()
BIAS = "expert_bias"


@dataclass(frozen=True)
class Case:
    shape: ModelShape
    source: Layout
    destination: Layout


def refit(rank: int, case: Case, close: bool = True) -> dict[str, int] | str | None:
    """Wrong elements by key on this rank's destination, or the error's text; None on ranks without a destination."""
    source, destination = built(case.shape, case.source), built(case.shape, case.destination)
    try:
        program = prepare_megatron_refit(source, destination, "gloo", device="cpu")
    except RefitError as error:
        return str(error)
    memory = read_weights(destination) if destination is not None else None
    for _ in range(2):
        if source is not None:
            fill(read_weights(source))
        if memory is not None:
            for shard in memory:
                shard.view.fill_(-7)
        program.run()
        if memory is not None:
            memory.refresh()
    if close:
        program.close()
    return None if memory is None else wrong(memory)


def wrong_keys(answers: list[dict[str, int] | None]) -> set[str]:
    """Keys with wrong elements on any destination rank, without buffers, which 0.16.1 never moves."""
    keys = {key for answer in answers if answer is not None for key in answer}
    assert OLD or not any(BIAS in key for key in keys)
    return {key for key in keys if BIAS not in key}


@pytest.mark.parametrize(
    "case",
    [
        Case(MOE, layout(ep=2), layout()),
        Case(MOE, layout(ep=2), layout(ep=4)),
        Case(LATENT, layout(tp=2, ep=2), layout(tp=2, ep=2, first=4)),
        Case(MOE, layout(ep=2, pp=2), layout(ep=2, first=5)),
        Case(replace(LATENT, mtp_num_layers=1), layout(ep=2, pp=2), layout(ep=2, first=5)),
        Case(LATENT_EXPERTS, layout(ep=2), layout(ep=4)),
        Case(DELTA_NETS, layout(tp=2, ep=2), layout(tp=2, ep=2, pp=2)),
    ],
    ids=["ep2-ep1", "ep2-ep4", "latent-apart", "pp2-pp1-apart", "token-prediction", "latent-experts", "delta-nets"],
)
def test_right_cases(ranks: RankPool, case: Case) -> None:
    answers = ranks.run(refit, case)
    assert [rank for rank, answer in enumerate(answers) if answer is not None] == list(case.destination.ranks)
    assert wrong_keys(answers) == set()
    if OLD:
        biases = {key for answer in answers if answer for key in answer}
        assert biases == {key for key in predict(case.shape, spec(case.source)).tensors if BIAS in key}


def test_sequential_experts_ep1_to_ep2_are_left_wrong(ranks: RankPool) -> None:
    """Experts are matched by their local number: EP rank 1 gets experts 0-3 in place of 4-7, without an error."""
    answers = ranks.run(refit, Case(SEQUENTIAL, layout(), layout(ep=2)))
    experts = {
        f"decoder.layers.{layer}.mlp.experts.experts.linear_fc{number}.weight"
        for layer in (1, 2, 3)
        for number in (1, 2)
    }
    assert {key for key in answers[0] if BIAS not in key} == set()
    assert {key for key in answers[1] if BIAS not in key} == experts
    assert answers[1]["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"] > 0.99 * 4 * 64 * 32


def test_sequential_experts_ep2_to_ep1_fail_on_every_rank(ranks: RankPool) -> None:
    answers = ranks.run(refit, Case(SEQUENTIAL, layout(ep=2), layout()))
    assert all("local_experts.4" in answer and "not found in source model" in answer for answer in answers)
    assert all(answer.startswith("Megatron-Core's own refit failed in planning") for answer in answers)


def test_change_of_expert_tensor_parallelism_scrambles_gate_and_up(ranks: RankPool) -> None:
    """With the attributes that grouped experts carry in either version."""
    answers = ranks.run(refit, Case(MOE, layout(tp=2, ep=1, etp=2), layout(first=2)))
    assert wrong_keys(answers) == {f"decoder.layers.{i}.mlp.experts.experts.linear_fc1.weight" for i in (1, 2, 3)}


@pytest.mark.skipif(not OLD, reason="0.19 plans it")
def test_refit_that_0_16_cannot_plan_fails_on_every_rank(ranks: RankPool) -> None:
    """0.16.1 plans on rank 0 only. Its error must reach the ranks that wait for the plan."""
    answers = ranks.run(refit, Case(MOE, layout(tp=2, ep=2, etp=2), layout(ep=2, first=4)))
    assert all("Cannot build TP descriptor" in answer for answer in answers)
    assert wrong_keys(ranks.run(refit, Case(MOE, layout(ep=2), layout()))) == set()


def test_change_of_tensor_parallelism_scrambles_delta_nets(ranks: RankPool) -> None:
    """Without a word: it cuts in_proj and conv1d as one piece, their sections lie one behind another on every rank."""
    answers = ranks.run(refit, Case(DELTA_NETS, layout(ep=2), layout(tp=2, ep=2)))
    sections = [f"{name}.conv1d" for name in ("query", "key", "value")]
    sections += [f"{name}.in_proj" for name in ("query", "key", "value", "z", "beta", "alpha")]
    assert wrong_keys(answers) == {
        f"decoder.layers.{layer}.self_attention.{name}.weight" for layer in (0, 1, 3) for name in sections
    }


def test_plans_are_not_reused_for_other_models(ranks: RankPool) -> None:
    """0.19.2's cache keys do not distinguish models: two shapes in one layout must each get their own plan."""
    where = layout(ep=2)
    first = ranks.run(refit, Case(MOE, where, where), False)
    second = ranks.run(refit, Case(LATENT, where, where))
    assert wrong_keys(first) == set()
    assert wrong_keys(second) == set()


def test_nvshmem_kernel_is_missing_from_wheels() -> None:
    with pytest.raises(UnavailableError, match=r"chunked_kernel\.cu"):
        prepare_megatron_refit(None, None, "nvshmem", device="cuda")


@pytest.mark.parametrize(
    ("method", "device", "transport"),
    [("shm", "cpu", "gloo"), ("gloo", "cpu", "gloo"), ("cuda-ipc", "cuda", "nccl"), ("nvshmem", "cuda", "nvshmem")],
)
def test_it_names_what_moves_its_bytes(method: str, device: str, transport: str) -> None:
    scenario = parse(["--model", "tiny", "--refit-method", method]).scenario
    engine = MegatronEngine(scenario, torch.device(device))
    assert engine.transport == transport
    note = engine.note()
    assert (note is None) == (method == transport)
    assert note is None or f"runs over {transport} here" in note


def test_ranks_that_share_a_gpu_run_it_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is connected over NCCL before."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    scenario = parse(["--model", "tiny", "--refit-method", "cuda-ipc", "--ranks-per-gpu", "2"]).scenario
    engine = MegatronEngine(scenario, torch.device("cuda"))
    assert engine.transport == "gloo"
    assert "runs over gloo here: it has no cuda-ipc, and NCCL refuses two ranks on one GPU" in (engine.note() or "")
