"""Outcome: how one scenario of a sweep ended, also where its result file is missing or incomplete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refit.plan.cost import Bound, Cost
from refit.results.identity import foreign
from refit.results.partial import progress_text, with_partial_times
from refit.results.reading import UnreadableFile
from refit.results.refit import EngineResult, RefitResult
from refit.results.result import CANCELLED, Result, read_result
from refit.results.status import Status
from refit.results.step import StepResult
from refit.results.sweep import Planned, Sweep, attempts


@dataclass(frozen=True, slots=True)
class Outcome:
    """A scenario and its last attempt. `reason` is None where it is ok. `log` is the name of the attempt's log.
    `unreadable` is set where its result file is damaged.

    Bytes and bound are those of the run, or of the plan made before it where the run has none.
    """

    planned: Planned
    status: Status
    reason: str | None
    result: Result | None
    log: str | None = None
    unreadable: UnreadableFile | None = None

    @property
    def refit(self) -> RefitResult:
        """The result of the refit measurement; empty where there is none."""
        return (self.result.refit if self.result else None) or RefitResult()

    @property
    def train_step(self) -> StepResult | None:
        """The result of the train-step measurement; None where there is none."""
        found = self.result.measurements.get("train-step") if self.result else None
        return found if isinstance(found, StepResult) else None

    @property
    def tested(self) -> EngineResult | None:
        return self.refit.tested

    @property
    def place(self) -> str:
        """What held its ranks: `GPU`; `rank` where they ran on CPUs."""
        return "rank" if self.result is not None and self.result.device == "cpu" else "GPU"

    @property
    def method(self) -> str:
        """What moved the bytes of the engine under test; where none ran, what the run chose or was planned with."""
        if self.tested is not None and self.tested.transport is not None:
            return self.tested.transport
        scenario = self.result.scenario if self.result else None
        return scenario.way if scenario else self.planned.way

    def transport_of(self, name: str | None) -> str:
        """What moved the bytes of the engine called `name`; with None, or for the one under test, `method`."""
        engine = self.refit.engines.get(name) if name is not None else None
        if engine is None or engine is self.tested:
            return self.method
        return engine.transport or "an unknown transport"

    @property
    def cost(self) -> Cost | None:
        return self.refit.plan or self.planned.cost

    @property
    def bound(self) -> Bound | None:
        return self.refit.bound or self.planned.bound

    @property
    def median_s(self) -> float | None:
        return self.tested.median_s if self.tested else None

    @property
    def share_of_bound(self) -> float | None:
        """The lower bound over the median, 0 to 1; None too where an encoding sends other bytes than the plan has."""
        if self.tested is not None and self.tested.sent_share is not None:
            return None
        return self.bound.seconds / self.median_s if self.bound and self.bound.seconds and self.median_s else None


def load_outcomes(sweep: Sweep, directory: Path) -> list[Outcome]:
    """The outcome of every scenario of `sweep`, in its order, from the last attempt in `directory`."""
    return [_outcome(sweep, planned, directory) for planned in sweep.scenarios]


def _outcome(sweep: Sweep, planned: Planned, directory: Path) -> Outcome:
    made = attempts(directory, sweep.run_id, planned.name)
    result, unreadable = None, None
    if made and made[-1].has_result:
        try:
            result = read_result(made[-1].json)
        except UnreadableFile as error:
            unreadable = error
    log = made[-1].log.name if made and made[-1].log.exists() else None
    if planned.status is not Status.READY and (result is None or not result.status.has_ended):
        return Outcome(planned, planned.status, planned.reason, result, log, unreadable)
    if not made:
        return Outcome(planned, Status.MISSING, "it was not started", None)
    if result is None:
        reason = str(unreadable) if unreadable else "it was interrupted before anything was written"
        return Outcome(planned, Status.MISSING, reason, None, log, unreadable)
    return judged(planned, result, log)


def judged(planned: Planned, result: Result, log: str | None = None) -> Outcome:
    """The outcome of a scenario that has a result."""
    if (reason := foreign(planned, result)) is not None:
        return Outcome(planned, Status.MISSING, reason, None, log)
    result = with_partial_times(result)
    engine = (result.refit or RefitResult()).tested or EngineResult()
    # Files of earlier versions call a run ok whose table does, and its forward check does not.
    status = engine.verdict if result.status is Status.OK and engine.fault else result.status
    if status is Status.OK:
        return Outcome(planned, status, None, result, log)
    if status is Status.WRONG_DATA:
        return Outcome(planned, status, _what_is_wrong(result, engine), result, log)
    reason = (str(result.failure) if result.failure else "") or " ".join((engine.reason or "").split())
    progress = progress_text(result)
    if status is Status.WAIVED:
        return Outcome(planned, status, reason or "no reason was recorded", result, log)
    if result.failure or status is Status.FAILED:
        reason = reason or f"exit code {result.exit_code}"
        after = f"{'' if reason == CANCELLED else ','} after {progress}" if progress else ""
        return Outcome(planned, Status.FAILED, f"{reason}{after}", result, log)
    measured = progress or f"{len(engine.measured_s)} measured refits"
    return Outcome(planned, Status.MISSING, f"it was interrupted after {measured}", result, log)


def _what_is_wrong(result: Result, engine: EngineResult) -> str:
    steps, refit = result.measurements.get("train-step"), result.refit
    found = [steps.reason] if isinstance(steps, StepResult) and steps.status is Status.WRONG_DATA else []
    found += [engine.fault]
    moved = refit.rearranged.tested if refit and refit.rearranged else None
    found += [f"after the experts were placed anew, {moved.fault}"] if moved and moved.fault else []
    return "; ".join(filter(None, found)) or "wrong data"


def are_on_cpus(outcomes: Sequence[Outcome]) -> bool:
    """Whether all that ran did so on CPUs."""
    ran = [outcome for outcome in outcomes if outcome.result is not None and outcome.result.device is not None]
    return bool(ran) and all(outcome.place == "rank" for outcome in ran)
