"""Decode steps of a running vLLM are timed, and stand beside their bound."""

from __future__ import annotations

from benchmarks.serving_bound import Case, decoded
from refit.config.clusters import load_cluster
from tests.models.vllm.engine.running import PYTHON, needs_vllm

pytestmark = needs_vllm

SMALL = Case("small", ("--model", "tiny_qwen3_moe"), ((1, 32), (4, 64)))


def test_a_running_engine_decodes_batches_of_its_own() -> None:
    rows = [*decoded(SMALL, PYTHON, load_cluster("h100_ib400"), "cpu")]
    assert [(row.batch, row.context, row.reason) for row in rows] == [(1, 32, ""), (4, 64, "")]
    assert all(row.seconds is not None and row.seconds > row.bound.seconds for row in rows)
