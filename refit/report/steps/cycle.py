"""The whole cycle of reinforcement learning, as far as a run measured it: what share the refit is, what to improve."""

from __future__ import annotations

from dataclasses import dataclass

from refit import units
from refit.results.result import Result
from refit.results.runs import outcome_of
from refit.results.status import Status
from refit.results.step import ForwardResult, StepResult

WHOLE = {"train-step", "refit", "forward"}
"""The measurements of a whole cycle."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """Seconds of a training step, a refit, and the prefill of as many tokens as the step trains on."""

    train_s: float
    refit_s: float
    forward_s: float

    @property
    def seconds(self) -> float:
        return self.train_s + self.refit_s + self.forward_s

    @property
    def refit_share(self) -> float:
        """0 to 1."""
        return self.refit_s / self.seconds

    @property
    def largest(self) -> str:
        parts = {"training step": self.train_s, "refit": self.refit_s, "forward": self.forward_s}
        return max(parts, key=parts.__getitem__)


def cycle_of(result: Result) -> Cycle | None:
    """The cycle of a run that measured all three parts; else None. A forward takes as long as its tokens need.

    None too where training gave wrong data: with routing by NaN, neither its time nor that of the forward counts.
    """
    train, forward = (result.measurements.get(name) for name in ("train-step", "forward"))
    refit_s = result.refit.tested.median_s if result.refit and result.refit.tested else None
    if not isinstance(train, StepResult) or not isinstance(forward, ForwardResult) or forward.prefill is None:
        return None
    if train.status is Status.WRONG_DATA or not train.median_s or not refit_s or not forward.prefill.tokens_per_s:
        return None
    return Cycle(train.median_s, refit_s, train.samples[-1].num_tokens / forward.prefill.tokens_per_s)


def cycle_lines(result: Result) -> list[str]:
    """Two lines: the parts with their shares, and the part to improve; empty where a part was not measured. One line
    where training gave wrong data: why."""
    cycle, train = cycle_of(result), result.measurements.get("train-step")
    if isinstance(train, StepResult) and train.status is Status.WRONG_DATA:
        return [f"No cycle: {train.reason}"] if result.measurements.keys() >= WHOLE else []
    if cycle is None:
        return []
    refit = f"refit over {outcome_of(result.run_id, result).method}"
    parts = (("training step", cycle.train_s), (refit, cycle.refit_s), ("forward", cycle.forward_s))
    texts = (f"{name} {units.seconds(part)} ({100 * part / cycle.seconds:.1f} %)" for name, part in parts)
    forward = result.measurements["forward"]
    how = ", in BF16" if isinstance(forward, ForwardResult) and forward.dequantised else ""
    return [
        f"Cycle of {units.seconds(cycle.seconds)}: {', '.join(texts)}; the forward is the prefill of the step's "
        f"tokens{how}",
        f"The refit is {100 * cycle.refit_share:.1f} % of it. To improve first: {_first(cycle, result)}",
    ]


def _first(cycle: Cycle, result: Result) -> str:
    """The largest part, and within a training step or a refit its largest phase."""
    train = result.measurements.get("train-step")
    phases: dict[str, float] = {}
    if cycle.largest == "training step" and isinstance(train, StepResult) and train.breakdown is not None:
        phases = {**train.breakdown.parts_s, "rest": train.breakdown.rest_s}
    tested = result.refit.tested if result.refit else None
    if cycle.largest == "refit" and tested is not None and tested.samples:
        phases = tested.samples[-1].phases_s
    return f"the {cycle.largest}" + (f", its {max(phases, key=phases.__getitem__)}" if phases else "")
