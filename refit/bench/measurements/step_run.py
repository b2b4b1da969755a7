"""Runs and times steps of one side: warm-up, measured steps, their samples, memory and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from refit.bench.clock import Spans, timed
from refit.bench.exchange import gather
from refit.bench.memory import peak_bytes, reset_peak, used_bytes
from refit.bench.session import Session
from refit.models.sharded_model import LiveSettings, StepReport
from refit.report.steps.step_lines import step_line
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.step import STEP_PARTS, Breakdown, StepResult, StepSample


@dataclass(frozen=True, slots=True)
class Work:
    """What one step computes, over all ranks. `label` is what the log calls it."""

    label: str
    num_warmup: int
    num_steps: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _RankStep:
    seconds: float
    report: StepReport
    allocated_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Recorded:
    seconds: float
    parts_s: dict[str, float]
    report: StepReport


@dataclass(frozen=True, slots=True)
class Numbers:
    """What all ranks reported of one step: `values` has the `loss` and the `grad_norm`, where there are any."""

    values: dict[str, float]
    skipped: bool

    def finite(self, name: str) -> float | None:
        value = self.values.get(name)
        return value if value is not None and math.isfinite(value) else None

    @property
    def not_finite(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.values.items() if not math.isfinite(value)}


def numbers_of(reports: Sequence[StepReport]) -> Numbers:
    """Replicas have equally many tokens, and their losses as many ranks: the mean over ranks is that over tokens.

    A norm that is not finite on one rank is that of the step: `max` may drop NaN.
    """
    losses = [each.loss for each in reports if each.loss is not None]
    norms = [each.grad_norm for each in reports if each.grad_norm is not None]
    values = {"loss": sum(losses) / len(losses)} if losses else {}
    if norms:
        values["grad_norm"] = next((norm for norm in norms if not math.isfinite(norm)), max(norms))
    return Numbers(values, any(each.skipped for each in reports))


def run_steps(
    session: Session,
    work: Work,
    result: StepResult,
    prepare: Callable[[int], Callable[[], StepReport]],
    publish: Callable[[StepResult], None],
) -> StepResult:
    """Run steps, warm-up first, and return `result` completed. `prepare(number)` makes the batch of a step and returns
    the step itself, which alone is timed.

    Collective: every rank of the job; on ranks outside the side the step does nothing.
    """
    has_peak, ranks = reset_peak(session.device), list[_RankStep]()
    for number in range(work.num_warmup + work.num_steps):
        session.enter(f"{work.label} {number + 1}")
        found = timed(prepare(number), session.control, session.device)
        peak = peak_bytes(session.device) if has_peak else None
        mine = _RankStep(found.seconds, found.value, used_bytes(session.device), peak)
        ranks = gather(session.control, mine)
        sample = _sample(ranks, number, work)
        result = replace(result, samples=(*result.samples, sample))
        publish(result)
        session.say(step_line(work.label, sample, number + 1, work.num_warmup, work.num_steps))
    return replace(
        result,
        status=Status.OK,
        summary=summarise([sample.seconds for sample in result.measured]),
        allocated_bytes_per_rank=tuple(each.allocated_bytes for each in ranks),
        peak_bytes_per_rank=tuple(each.peak_bytes for each in ranks),
    )


def run_recorded(session: Session, label: str, step: Callable[[], StepReport], spans: Spans) -> Breakdown:
    """Run one more step, which `spans` records; Collective: every rank of the job.

    Its parts are those of the slowest rank; those of experts are of the rank where they take longest, since a pipeline
    stage may have none.
    """
    session.enter(f"{label}: breakdown")
    found = timed(step, session.control, session.device)
    ranks: list[_Recorded] = gather(session.control, _Recorded(found.seconds, spans.seconds(), found.value))
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].seconds)
    seconds, parts = ranks[slowest].seconds, ranks[slowest].parts_s
    top = {name: parts[name] for name in STEP_PARTS if name in parts}
    inner = [{name: each.parts_s[name] for name in each.parts_s if name not in STEP_PARTS} for each in ranks]
    experts = max(inner, key=lambda each: sum(each.values()))
    not_finite = numbers_of([each.report for each in ranks]).not_finite
    return Breakdown(seconds, slowest, top, seconds - sum(top.values()), experts, not_finite)


def live_settings(session: Session, mine: LiveSettings) -> LiveSettings:
    """The settings of a side, on every rank: its first rank's configuration and the dispatchers of all its ranks.

    Collective: every rank of the job.
    """
    ranks: list[LiveSettings] = gather(session.control, mine)
    dispatchers = sorted({each.dispatcher for each in ranks if each.dispatcher is not None})
    return LiveSettings("+".join(dispatchers) or None, next((each.config for each in ranks if each.config), {}))


def _sample(ranks: list[_RankStep], number: int, work: Work) -> StepSample:
    numbers = numbers_of([each.report for each in ranks])
    return StepSample(
        step=number,
        warmup=number < work.num_warmup,
        seconds_per_rank=tuple(each.seconds for each in ranks),
        slowest_rank=max(range(len(ranks)), key=lambda rank: ranks[rank].seconds),
        num_tokens=work.num_tokens,
        loss=numbers.finite("loss"),
        grad_norm=numbers.finite("grad_norm"),
        skipped=numbers.skipped,
        not_finite=numbers.not_finite,
        allocated_bytes=max(each.allocated_bytes for each in ranks),
        peak_bytes=max((each.peak_bytes for each in ranks if each.peak_bytes is not None), default=None),
    )
