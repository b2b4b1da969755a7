"""The headline of a result: one line per engine with its time, speed and verdict, the same wherever it is printed."""

from __future__ import annotations

from refit import units
from refit.config.registry import ENGINES
from refit.config.scenario import Mode, Verify
from refit.plan.cost import Bound, Cost
from refit.report.refits.delta_lines import delta_headline
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult, speed_ratio
from refit.results.stats import Summary
from refit.results.status import Status
from refit.results.step import StepResult


def headlines(outcome: Outcome) -> list[str]:
    """One headline per engine, then a line for each baseline's ratio or for why there is none."""
    engines = outcome.refit.engines
    if not engines:
        return [headline(outcome, None)]
    return [*(headline(outcome, name) for name in engines), *ratios(outcome)]


def headline(outcome: Outcome, name: str | None) -> str:
    """The line of the engine `name`; with None, that of a scenario in which no engine ran.

    `TP2 EP2 -> TP2 EP1 over nccl: 61.8 ms median (60.9-63.0, 7 refits), 291 GB/s = 74 % of the link's bound, 0 of
    96.0 M elements wrong`. A result that does not count says why before its figures, and has no share of the bound.
    """
    engine = outcome.refit.engines[name] if name else None
    problem = problem_of(outcome, engine)
    figures = _figures(outcome, engine, problem) if engine and engine.summary else ""
    found = "; ".join(part for part in (problem, figures) if part)
    if not found and (steps := outcome.train_step) is not None:
        return steps_headline(outcome, steps)
    return f"{what_ran(outcome, name)}: {found or 'no refit was measured'}"


def steps_headline(outcome: Outcome, steps: StepResult) -> str:
    """`TP1 EP8 train step by MoEAlltoAllTokenDispatcher: 812 ms median, 161,000 tokens/s, 412 TFLOP/s per rank`."""
    source = outcome.planned.source
    by = f" by {steps.dispatcher}" if steps.dispatcher else ""
    what = f"{source.title if source else 'unknown layout'} train step{by}"
    if steps.summary is None:
        return f"{what}: no steps were measured"
    return (
        f"{what}: {units.seconds(steps.summary.median_s)} median ({len(steps.measured)} steps), "
        f"{steps.tokens_per_s:,.0f} tokens/s, {steps.tflops_per_gpu:,.4g} TFLOP/s per rank"
    )


def what_ran(outcome: Outcome, name: str | None) -> str:
    """`TP2 EP2 -> TP2 EP1 over nccl`, with `collocated` where both sides share GPUs and the name of a baseline; the
    layouts alone where no refit is measured."""
    planned = outcome.planned
    sides = (planned.source, planned.destination if planned.uses_destination else None)
    layouts = " -> ".join(side.title for side in sides if side) or "unknown layouts"
    if not planned.refits:
        return layouts
    shared = " collocated" if planned.mode == Mode.COLLOCATED.value else ""
    by = f" by {title(name)}" if name is not None and _is_baseline(outcome, name) else ""
    return f"{layouts}{shared} over {outcome.transport_of(name)}{by}"


def between(outcome: Outcome, name: str, owner: str = "") -> str:
    """`shm against gloo`: what moved the bytes of the engine under test and of the baseline `name`, with `owner` before
    the latter; empty where both went the same way. A ratio of their times is printed with it."""
    ours, theirs = outcome.method, outcome.transport_of(name)
    return "" if ours == theirs else f"{ours} against {owner}{theirs}"


def title(name: str) -> str:
    """An engine's name for people."""
    return ENGINES[name].title if name in ENGINES else name


def _is_baseline(outcome: Outcome, name: str) -> bool:
    return name in outcome.refit.baselines or (name in ENGINES and ENGINES[name].is_baseline)


def problem_of(outcome: Outcome, engine: EngineResult | None) -> str | None:
    """Why the engine's figures do not count: `WRONG`, `UNVERIFIED`, `FAILED: reason`, ...; None where they do.

    Also where the refit is right and something else in its run is wrong: `WRONG DATA: reason`.
    """
    is_named = outcome.status is Status.WRONG_DATA and engine is not None and engine.doubt is not None
    if engine in (None, outcome.tested) and outcome.status is not Status.OK and not is_named:
        return f"{outcome.status.text.upper()}: {outcome.reason or 'no reason was recorded'}"
    if engine is None or engine.doubt is None:
        return None
    if engine.status in (Status.FAILED, Status.WAIVED):
        return f"{engine.doubt.upper()}: {' '.join((engine.reason or 'no reason was recorded').split())}"
    return f"PARTIAL: {moved_text(outcome.cost, engine)}" if engine.doubt == "partial" else engine.doubt.upper()


def moved_text(cost: Cost | None, engine: EngineResult) -> str:
    """`moved 8.66 GB of 9.86 GB`, of a result with tensors that were not moved."""
    if cost is None:
        return f"{units.gb(engine.not_moved_bytes)} not moved"
    return f"moved {units.gb(cost.payload_bytes - engine.not_moved_bytes)} of {units.gb(cost.payload_bytes)}"


def _figures(outcome: Outcome, engine: EngineResult, problem: str | None) -> str:
    assert engine.summary is not None
    num_refits = len(engine.measured_s)
    parts = [
        _times(engine.summary, num_refits),
        delta_headline(outcome.refit) if engine is outcome.tested else "",
        _speed(engine, None if problem else outcome.bound),
        _pause(engine),
        _wrong(outcome, engine),
    ]
    return ", ".join(part for part in (*parts, *engine.wrong_passes) if part)


def _times(summary: Summary, num_refits: int) -> str:
    """`61.8 ms median (60.9-63.0, 7 refits)`: one unit and as many decimals for all three times."""
    unit = units.time_unit(summary.median_s)
    median, low, high = (
        f"{seconds / unit.seconds:,.{units.decimals(summary.median_s / unit.seconds)}f}"
        for seconds in (summary.median_s, summary.min_s, summary.max_s)
    )
    spread = f"{low}-{high}, {num_refits} refits" if num_refits > 1 else "1 refit"
    return f"{median} {unit.name} median ({spread})"


def _speed(engine: EngineResult, bound: Bound | None) -> str:
    """`291 GB/s = 74 % of the link's bound`; what is not known, or where nothing crosses a link, is left out."""
    rate = f"{units.three_digits(engine.bottleneck_gb_per_s)} GB/s" if engine.bottleneck_gb_per_s else ""
    if bound is None or not bound.seconds or not engine.median_s or engine.sent_share is not None:
        return rate
    percent = 100 * bound.seconds / engine.median_s
    share = f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
    return f"{rate} = {share} of the link's bound" if rate else f"{share} of the lower bound"


def _pause(engine: EngineResult) -> str:
    """`engine pause 45.1 ms`; empty where no engine runs."""
    paused = engine.served.pause_s if engine.served else None
    return "" if paused is None else f"engine pause {units.seconds(paused)}"


def _wrong(outcome: Outcome, engine: EngineResult) -> str:
    if not engine.num_compared:
        return "no element compared"
    scenario = outcome.result.scenario if outcome.result else None
    how = " (every 16th row compared)" if scenario and scenario.verify is Verify.SAMPLE else ""
    return f"{engine.num_wrong:,} of {units.short_count(engine.num_compared)} elements wrong{how}"


def ratios(outcome: Outcome) -> list[str]:
    """How the engine under test compares with each baseline of the same run; nothing unless both have times.

    Full refits are compared with in the headline itself.

    Where either result does not count, the line says so in place of a ratio.
    """
    tested = outcome.tested
    if tested is None or tested.median_s is None:
        return []
    timed = (
        (name, theirs)
        for name, theirs in outcome.refit.baselines.items()
        if theirs.median_s is not None and not _is_in_headline(name)
    )
    return [_ratio(outcome, tested, theirs, name) for name, theirs in timed]


def _is_in_headline(name: str) -> bool:
    """Whether the headline of the engine under test has its ratio with this baseline."""
    return name in ENGINES and ENGINES[name].sends_everything


def _ratio(outcome: Outcome, tested: EngineResult, theirs: EngineResult, name: str) -> str:
    whose = title(name)
    found = speed_ratio(tested, theirs) if outcome.status is Status.OK else None
    if found is None:
        ours = tested.doubt or (None if outcome.status is Status.OK else outcome.status.text)
        doubts = [f"{who} is {doubt}" for who, doubt in (("refit", ours), (whose, theirs.doubt)) if doubt]
        return f"Ratio: none: {', '.join(doubts) or 'no times'}"
    cold = f", {theirs.cold_total_s / tested.cold_total_s:.2f} x cold" if tested.cold_s and theirs.cold_s else ""
    ways = between(outcome, name, f"{whose}'s ")
    return f"Ratio: refit is {found:.2f} x as fast as {whose}'s own (median){cold}" + (f": {ways}" if ways else "")


def marked_ms(engine: EngineResult | None, doubt: str | None = None) -> str:
    """`117.70`, or `117.70 (WRONG)` where the result is in doubt, by itself or by `doubt`; empty without times."""
    if engine is None or engine.median_s is None:
        return ""
    reason = engine.doubt or doubt
    return f"{1e3 * engine.median_s:.2f}" + (f" ({reason})" if reason else "")
