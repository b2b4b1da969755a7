"""The line that sets a measured prefill beside its bound."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refit.cli.parsing import parse
from refit.config.clusters import Cluster, load_cluster
from refit.predict.flops import forward_flops
from refit.report.steps.step_lines import forward_closing_lines
from refit.results.result import Result
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.step import ForwardResult, StepResult

FLAGS = ("--model=llama3_8b", "--source=TP1", "--destination=TP1", "--refit-mode=collocated", "--measure=forward")
FLAGS += ("--global-batch-size=2", "--micro-batch-size=2", "--seq-length=2048", "--dry-run")


def lines_on(cluster: Cluster | None, *, dequantised: bool = False) -> list[str]:
    scenario = replace(parse(FLAGS).scenario, cluster=cluster)
    assert scenario.model is not None
    passes = StepResult(
        status=Status.OK,
        num_ranks=1,
        num_microbatches=1,
        sequences_per_step=2,
        flops_per_step=forward_flops(scenario.model, 2, 2048),
        summary=summarise([0.25]),
    )
    found = ForwardResult(prefill=passes, dequantised=dequantised)
    return [line for line in forward_closing_lines(found, Result("run", scenario=scenario)) if "its bound" in line]


def test_a_prefill_stands_beside_its_bound() -> None:
    """8 B parameters and 4,096 tokens are limited by arithmetic: the bound is that of the operations."""
    cluster = load_cluster("h100_ib400")
    (line,) = lines_on(cluster)
    model = parse(FLAGS).scenario.model
    assert model is not None
    bound_ms = 1e3 * forward_flops(model, 2, 2048) / 989e12
    assert line.startswith(f"Prefill: {250 / bound_ms:.3g} x its bound of {bound_ms:.4g} ms on h100_ib400: ")
    assert line.endswith("limited by arithmetic")


@pytest.mark.parametrize("missing", ["memory_bytes_per_s", "bf16_flops_per_s"])
def test_without_speeds_there_is_no_bound(missing: str) -> None:
    assert lines_on(None) == []
    assert lines_on(replace(load_cluster("h100_ib400"), **{missing: None})) == []
