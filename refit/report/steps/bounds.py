"""The bound of a measured prefill beside its time, where the run's cluster has the speeds that it needs."""

from __future__ import annotations

from dataclasses import replace

from refit import units
from refit.config.registry import FORMATS, load
from refit.predict.serving.roofline import Serving
from refit.report.plans.answer import limit
from refit.results.result import Result
from refit.results.step import ForwardResult, StepResult


def bound_lines(label: str, result: ForwardResult, measured: StepResult, run: Result) -> list[str]:
    """How many times its bound a pass took; empty without a cluster's speeds, and for what has no bound."""
    scenario = run.scenario
    if scenario is None:
        return []
    shape, side, cluster, steps = scenario.model, scenario.destination, scenario.cluster, scenario.steps
    if shape is None or side.dtype is None or cluster is None or steps is None or measured.median_s is None:
        return []
    count = FORMATS[side.format].serving if side.format in FORMATS else None
    if count is None or cluster.memory_bytes_per_s is None or cluster.bf16_flops_per_s is None:
        return []
    held = replace(side, quantisation=None) if result.dequantised else side
    serving = Serving(shape, side.dtype, load(count)(shape, held), cluster)
    bound = serving.prefill(steps.micro_batch_size, steps.seq_length, all_logits=True)
    return [
        f"{label}: {measured.median_s / bound.seconds:,.3g} x its bound of {units.milliseconds(bound.seconds)} on "
        f"{cluster.name}: {limit(bound)}"
    ]
