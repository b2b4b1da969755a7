"""Whole scenarios on eight forked ranks: all steps of a torchrun job, including the oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from refit.bench.measurements import engine_run
from refit.bench.runner import benchmark
from refit.bench.session import new_session
from refit.cli.parsing import parse
from refit.results.refit import RefitResult
from refit.results.result import ResultFile, read_result
from refit.results.upgrade import RESULT_VERSION
from tests.bench.faults import fault
from tests.ranks.pool import RankPool
from tests.transport.test_transports import BACKENDS

TINY = ["--model", "tiny", "--num-layers", "2", "--moe-layer-freq", "([0]*1+[1]*1)", "--vocab-size", "1000"]
TINY += [
    "--hidden-size",
    "64",
    "--ffn-hidden-size",
    "128",
    "--moe-ffn-hidden-size",
    "32",
    "--num-benchmark-warmup",
    "1",
]
TINY += ["--moe-shared-expert-intermediate-size", "32", "--num-benchmark-iterations", "2"]
FC1 = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
METHODS = sorted({method for method, _ in BACKENDS})

EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"


def run_scenario(rank: int, argv: list[str], directory: str | None = None, fault_args: tuple[str, ...] = ()) -> Any:
    """The result, which is the same on every rank."""
    scenario = parse(argv).scenario
    control = dist.group.WORLD
    assert control is not None
    file = ResultFile.create(Path(directory), "run") if directory and rank == 0 else None
    session = new_session(scenario, torch.device("cpu"), control)
    with fault(*(fault_args or (None,))):
        return benchmark(session, file)


def sizes(tp: int, ep: int, etp: int, pp: int, prefix: str = "") -> list[str]:
    etp_flag = "rl-inference-expert-tensor-model-parallel-size" if prefix else "expert-tensor-parallel-size"
    axes = {"tensor-model": tp, "expert-model": ep, "pipeline-model": pp}
    flags = [f"--{prefix}{axis}-parallel-size={size}" for axis, size in axes.items()]
    world = "destination-world-size" if prefix else "source-world-size"
    return [*flags, f"--{etp_flag}={etp}", f"--{world}={tp * ep * pp}"]


def refit(
    ranks: RankPool, *argv: str, fault_args: tuple[str, ...] = (), directory: Path | None = None
) -> tuple[int, RefitResult]:
    answers = ranks.run(run_scenario, [*TINY, *argv], str(directory) if directory else None, fault_args)
    assert [answer.exit_code for answer in answers] == [answers[0].exit_code] * 8
    return answers[0].exit_code, answers[0].measurements["refit"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("source", "destination", "mode"),
    [
        ((2, 2, 1, 1), (2, 1, 1, 1), "non-collocated"),
        pytest.param((4, 1, 4, 1), (2, 2, 2, 1), "non-collocated", marks=pytest.mark.slow),
        ((2, 1, 2, 2), (1, 4, 1, 1), "non-collocated"),
        ((4, 2, 2, 1), (2, 4, 1, 1), "collocated"),
        ((2, 2, 2, 2), (8, 1, 8, 1), "collocated"),
        pytest.param((4, 2, 4, 1), (4, 1, 1, 1), "collocated", marks=pytest.mark.slow),
    ],
)
def test_refits_arrive_bit_for_bit(ranks: RankPool, source: Any, destination: Any, mode: str, method: str) -> None:
    flags = [
        *sizes(*source),
        *sizes(*destination, prefix="rl-inference-"),
        f"--refit-mode={mode}",
        "--num-query-groups=8",
    ]
    code, result = refit(ranks, *flags, f"--refit-method={method}")
    engine = result.engines["refit"]
    assert (code, engine.status, engine.num_wrong) == (0, "ok", 0)
    tp, ep, _, pp = destination
    world_size = tp * ep * pp
    assert result.model is not None
    assert engine.num_compared >= 3 * result.model.num_parameters
    assert engine.num_compared <= 3 * result.model.num_parameters * world_size // pp


@pytest.mark.one_megatron
@pytest.mark.parametrize("method", METHODS)
def test_a_refit_in_stages_is_verified_and_its_result_counts_every_hop(
    ranks: RankPool, tmp_path: Path, method: str
) -> None:
    """Two source ranks; three replicas of two, which get all from each other but what comes first."""
    flags = [*sizes(2, 1, 2, 1), *sizes(2, 1, 2, 1, prefix="rl-inference-"), "--destination-world-size=6"]
    flags += [f"--refit-method={method}", "--num-query-groups=8"]
    _, at_once = refit(ranks, *flags)
    code, result = refit(ranks, *flags, fault_args=("none_but_stages", "2"), directory=tmp_path)
    engine, plan = result.engines["refit"], result.plan
    assert (code, engine.status, engine.num_wrong) == (0, "ok", 0)
    assert plan is not None
    assert at_once.plan is not None
    assert plan.digest != at_once.plan.digest
    assert plan.payload_bytes == at_once.plan.payload_bytes
    assert plan.received_by_rank == at_once.plan.received_by_rank
    assert sum(plan.sent_by_rank.values()) == plan.wire_bytes == at_once.plan.wire_bytes
    assert sum(plan.sent_by_rank[rank] for rank in (0, 1)) < plan.wire_bytes
    (path,) = tmp_path.glob("*.json")
    stored = read_result(path).measurements["refit"]
    assert stored.plan == plan


CHUNKED = ["--num-layers=4", "--moe-layer-freq=([0]*1+[1]*3)", "--mtp-num-layers=1", "--moe-latent-size=16"]
VIRTUAL = "num-virtual-stages-per-pipeline-rank=2"


@pytest.mark.parametrize(
    "flags",
    [
        [*sizes(2, 2, 1, 2), *sizes(2, 2, 1, 1, "rl-inference-"), f"--{VIRTUAL}", "--refit-mode=collocated"],
        [*sizes(2, 1, 2, 2), *sizes(1, 1, 1, 4, "rl-inference-"), f"--{VIRTUAL}"],
        [*sizes(1, 2, 1, 2), *sizes(2, 1, 2, 2, "rl-inference-"), f"--rl-inference-{VIRTUAL}"],
        [*sizes(1, 1, 1, 4), *sizes(1, 2, 1, 2, "rl-inference-"), f"--rl-inference-{VIRTUAL}", "--moe-grouped-gemm"],
    ],
    ids=["to-one-stage", "to-four-stages", "to-virtual-stages", "four-stages-to-virtual"],
)
def test_chunks_token_prediction_and_latent_experts_arrive(ranks: RankPool, flags: list[str]) -> None:
    more = [*CHUNKED, *flags, "--refit-method=gloo", "--check-forward", "--num-query-groups=8", "--fp32"]
    code, result = refit(ranks, *more)
    engine = result.engines["refit"]
    assert (code, engine.status, engine.num_wrong) == (0, "ok", 0)
    assert engine.forward is not None
    assert (engine.forward.agreement, engine.forward.skipped) == (1.0, None)


def test_result_file_says_everything(ranks: RankPool, tmp_path: Path) -> None:
    flags = [*sizes(2, 2, 1, 1), *sizes(2, 1, 1, 1, "rl-inference-"), "--refit-method=gloo", "--seq-length=128"]
    refit(ranks, *flags, directory=tmp_path)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert (content["schema_version"], content["status"], content["exit_code"]) == (RESULT_VERSION, "ok", 0)
    assert content["scenario"]["recorded"] == {"seq-length": 128}
    assert (content["device"], content["world_size"]) == ("cpu", 8)
    assert content["environment"]["versions"]["torch"] == torch.__version__
    measured = content["measurements"]["refit"]
    plan, engine = measured["plan"], measured["engines"]["refit"]
    assert plan["payload_bytes"] == plan["wire_bytes"] + plan["local_bytes"]
    assert sum(plan["received_by_rank"].values()) == plan["wire_bytes"]
    assert [sample["warmup"] for sample in engine["samples"]] == [True, False, False]
    for sample in engine["samples"]:
        assert len(sample["seconds_per_rank"]) == 8
        total = sum(sample["phases_s"].values()) + sample["unattributed_s"]
        assert total == pytest.approx(max(sample["seconds_per_rank"]))
    assert set(engine["cold_s"]) == {"plan", "prepare", "first"}
    assert engine["connect_s"] >= 0, "what a process does once is not part of the first refit"
    assert engine["connect_memory_bytes_per_rank"] == [0] * 8
    assert all(staged <= 512 << 20 for staged in engine["staging_bytes_per_rank"])


EP_DOWN = [*sizes(2, 2, 1, 1), *sizes(2, 1, 1, 1, "rl-inference-"), "--refit-method=gloo"]


def test_times_are_held_against_a_cluster_that_is_named(ranks: RankPool) -> None:
    _, result = refit(ranks, *EP_DOWN, "--cluster=h200_nvlink")
    engine, bound = result.engines["refit"], result.bound
    assert bound is not None
    assert result.plan is not None
    assert engine.summary is not None
    assert bound.cluster == "h200_nvlink"
    assert bound.seconds == pytest.approx(result.plan.busiest.nbytes / 391e9)
    assert bound.limited_by.startswith("rank 4 receives ")
    assert engine.share_of_lower_bound == pytest.approx(bound.seconds / engine.summary.median_s)


def test_on_cpus_no_cluster_is_guessed(ranks: RankPool) -> None:
    _, result = refit(ranks, *EP_DOWN)
    assert result.bound is None
    assert result.engines["refit"].share_of_lower_bound is None


def test_a_byte_flipped_in_flight_is_found(ranks: RankPool) -> None:
    code, result = refit(ranks, *EP_DOWN, fault_args=("byte_flipped_in_flight",))
    wrong = result.engines["refit"].wrong
    assert code == 1
    assert {each.rank for each in wrong} == {4, 5}
    assert sum(each.num_wrong for each in wrong) == 2  # one element on each destination rank, in the first refit only


@pytest.mark.parametrize("key", [FC1, EXPERTS])
def test_a_skipped_transfer_is_named(ranks: RankPool, key: str) -> None:
    code, result = refit(ranks, *EP_DOWN, fault_args=("transfer_skipped", key))
    assert code == 1
    assert {each.key for each in result.engines["refit"].wrong} == {key}


@pytest.mark.parametrize("key", [FC1, EXPERTS], ids=["gate and up", "two experts"])
def test_swapped_parts_are_named(ranks: RankPool, key: str) -> None:
    code, result = refit(ranks, *EP_DOWN, fault_args=("parts_swapped", key))
    wrong = result.engines["refit"].wrong
    assert code == 1
    assert {each.key for each in wrong} == {key}
    assert {each.rank for each in wrong} == {4, 5}


def test_last_iterations_weights_are_found_everywhere(ranks: RankPool) -> None:
    code, result = refit(ranks, *EP_DOWN, fault_args=("last_iteration_repeated",))
    first, *later = result.engines["refit"].samples
    assert code == 1
    assert first.num_wrong == 0
    assert all(sample.num_wrong > 0.99 * sample.num_compared for sample in later)


def test_verify_off_compares_nothing_and_says_so(ranks: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    code, result = refit(ranks, *EP_DOWN, "--verify=off", fault_args=("transfer_skipped", FC1))
    assert (code, result.engines["refit"].num_compared) == (0, 0)


def test_verify_sample_finds_what_is_widespread(ranks: RankPool) -> None:
    code, result = refit(ranks, *EP_DOWN, "--verify=sample", fault_args=("last_iteration_repeated",))
    engine = result.engines["refit"]
    assert code == 1
    assert engine.num_compared < 0.1 * 3 * 2 * result.model.num_parameters


def test_forward_check_agrees(ranks: RankPool) -> None:
    _, result = refit(ranks, *EP_DOWN, "--check-forward", "--fp32")
    forward = result.engines["refit"].forward
    assert forward is not None
    assert forward.skipped is None
    assert forward.passed
    assert forward.max_difference < 1e-3 * forward.max_logit


def test_forward_check_can_fail(ranks: RankPool) -> None:
    code, result = refit(
        ranks, *EP_DOWN, "--check-forward", "--fp32", "--verify=off", fault_args=("last_iteration_repeated",)
    )
    forward = result.engines["refit"].forward
    assert code == 1
    assert forward is not None
    assert not forward.passed


def test_the_baseline_is_wrong_where_experts_are_sequential_and_ours_is_right(ranks: RankPool) -> None:
    flags = [*sizes(1, 1, 1, 1), *sizes(1, 2, 1, 1, "rl-inference-"), "--refit-method=shm", "--refit-engine=both"]
    code, result = refit(ranks, *flags)
    ours, baseline = result.engines["refit"], result.engines["megatron"]
    assert (code, ours.status, ours.num_wrong) == (0, "ok", 0)
    assert (ours.transport, baseline.transport) == ("shm", "gloo")
    assert baseline.status == "wrong_data"
    assert all(".mlp.experts." in each.key for each in baseline.wrong)


def test_the_baseline_alone_is_judged(ranks: RankPool) -> None:
    flags = [*sizes(1, 1, 1, 1), *sizes(1, 2, 1, 1, "rl-inference-"), "--refit-method=gloo", "--refit-engine=megatron"]
    code, result = refit(ranks, *flags)
    assert code == 1
    assert list(result.engines) == ["megatron"]


def test_a_model_of_the_users_own(ranks: RankPool) -> None:
    flags = ["--model-provider=examples.custom_model:build", *EP_DOWN, "--num-benchmark-warmup=1"]
    flags += ["--num-benchmark-iterations=2"]
    answer = ranks.run(run_scenario, flags)[0]
    engine = answer.measurements["refit"].engines["refit"]
    assert (answer.exit_code, engine.num_wrong) == (0, 0)
    assert answer.scenario.model is None
    assert engine.num_compared > 0


def test_refits_go_on_until_the_median_is_stable_or_the_limit(ranks: RankPool) -> None:
    """Times on a busy machine may or may not get stable: every rank must end after the same refit all the same."""
    code, result = refit(ranks, *sizes(2, 1, 1, 1), "--refit-method=shm", "--repeat-until-stable=9")
    engine = result.engines["refit"]
    stability = engine.stability
    assert code == 0
    assert stability is not None
    assert stability.num_refits == len(engine.measured_s)
    assert 6 <= stability.num_refits <= 9
    assert stability.is_stable or stability.num_refits == 9
    assert engine.num_wrong == 0
    assert all(sample.num_compared for sample in engine.samples)


def test_refits_end_at_the_first_stable_median(ranks: RankPool) -> None:
    answers = ranks.run(run_steady, [*TINY, *sizes(2, 1, 1, 1), "--refit-method=shm", "--repeat-until-stable"])
    for answer in answers:
        engine = answer.measurements["refit"].engines["refit"]
        assert (engine.stability.num_refits, engine.stability.is_stable) == (6, True)
        assert len(engine.samples) == 7  # with the warm-up


def run_steady(rank: int, argv: list[str]) -> Any:
    """A run whose clock gives each refit the same time."""
    real = engine_run.time_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_run, "time_run", lambda *args: replace(real(*args), seconds=0.01))
        return run_scenario(rank, argv)
