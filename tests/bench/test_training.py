"""Refits of what optimizer steps have changed: what is found, what it is compared with, what it says of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refit.results.shares import kind_rows, share_rows
from refit.results.status import Status
from tests.encodings.delta.test_refits import run_scenario
from tests.ranks.pool import RankPool

MODEL = ["--model=tiny_qwen3_moe", "--num-layers=1", "--vocab-size=512"]
STEPS = [
    *("--measure=train-step,refit", "--seq-length=16", "--global-batch-size=8", "--micro-batch-size=2"),
    *("--num-train-steps=1", "--num-train-warmup=1", "--lr=1e-5", "--source-world-size=2", "--refit-method=gloo"),
]
TO_ONE = ["--rl-inference-tensor-model-parallel-size=1"]
SOURCES = {
    "tp": ["--tensor-model-parallel-size=2", "--sequence-parallel"],
    "dp": ["--expert-model-parallel-size=2"],
    "fsdp2": ["--source-format=fsdp2"],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("to", [TO_ONE, [*TO_ONE, "--rl-inference-dtype=mxfp8"]], ids=["bf16", "fp8"])
def test_what_steps_change_is_sent_and_counted_by_kind(
    ranks: RankPool, source: str, to: list[str], tmp_path: Path
) -> None:
    argv = [*STEPS, *SOURCES[source], *to]
    result, output, stored = ranks.run(run_scenario, argv, None, str(tmp_path), MODEL)[0]
    engine = result.refit.engines["refit"]
    assert stored.refit.engines["refit"] == engine
    assert (result.exit_code, engine.status, engine.num_wrong) == (0, Status.OK, 0), output
    first, *later = (sample.delta for sample in engine.samples)
    assert (first.num_full > 0, first.by_kind, first.asked_share) == (True, {}, None)
    assert all(each.num_full == 0 and each.asked_share is None for each in later)
    kinds = {row.kind: row for row in kind_rows(result.refit)}
    assert list(kinds) == ["output layer", "embedding", "attention", "experts", "router", "norms", "all"]
    assert kinds["all"].num_elements == result.refit.model.num_parameters
    assert 0.01 < kinds["experts"].mean < 0.5
    assert kinds["norms"].mean == 0  # near 1, a step is less than half of the distance to the next number
    (row,) = share_rows(result.refit)
    assert row.num_refits == 3
    if "mxfp8" not in to[-1]:
        assert row.changed_share == pytest.approx(kinds["all"].mean, rel=0.01)
    assert all(sample.num_compared == engine.samples[0].num_compared > 0 for sample in engine.samples)
    assert "changed by a step (output layer " in output
    assert "Forward check (refit, trained weights) passed" in output or "mxfp8" in to[-1]


@pytest.mark.one_megatron
def run_auto(rank: int, argv: list[str]) -> Any:
    return run_scenario(rank, [*argv, "--refit-encoding=auto", "--num-benchmark-warmup=6"], model=MODEL)


def test_auto_takes_real_changes_too(ranks: RankPool) -> None:
    result, output, _ = ranks.run(run_auto, [*STEPS, *SOURCES["tp"], *TO_ONE])[0]
    engine = result.refit.engines["refit"]
    assert (engine.status, engine.num_wrong) == (Status.OK, 0), output
    assert all(sample.delta.by_kind for sample in engine.samples[1:])


@pytest.mark.one_megatron
@pytest.mark.parametrize("broken", ["snapshot_runs_ahead", "swallowed_apply"])
def test_mutants_are_found(ranks: RankPool, broken: str) -> None:
    """A wrong base is one that a step's changes show only where a destination has joined: tests of the oracle's."""
    result, output, _ = ranks.run(run_scenario, [*STEPS, *SOURCES["tp"], *TO_ONE], broken, None, MODEL)[0]
    engine = result.refit.engines["refit"]
    assert engine.status is Status.WRONG_DATA, output
    assert engine.num_wrong > 0
    wrong = engine.wrong[0]
    assert len(wrong.first_index) > 0
    assert wrong.num_wrong > 0
