"""The summary of a sweep: a few lines per scenario that people read, and that scripts may search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from refit import units
from refit.config.scenario import Verify
from refit.config.side import SideSpec
from refit.report.refits import checkpoint_lines
from refit.report.refits.brief import brief_table
from refit.report.refits.entries import entries_of
from refit.report.refits.headline import headlines
from refit.report.refits.run_spread import by_scenario, run_spread_lines
from refit.report.steps import step_lines
from refit.report.terminal.escaped import FILE_WIDTH, plain_lines
from refit.results.outcomes import Outcome, are_on_cpus
from refit.results.refit import EngineResult
from refit.results.runs import Run
from refit.results.stats import Summary
from refit.results.status import COUNTED, Status
from refit.results.sweep import Planned, Sweep


def summary_text(sweep: Sweep, outcomes: Sequence[Outcome], width: int = FILE_WIDTH) -> str:
    """The summary file's content, without a newline at its end. Lines of its table have at most `width` characters."""
    title = f"{sweep.title} Refit Benchmark Summary".strip()
    lines = [
        title,
        "=" * len(title),
        f"Date: {sweep.date}",
        f"Job ID: {', '.join(sweep.jobs) or 'none'}",
        f"Nodes: {sweep.nodes}",
        f"Total ranks, on CPUs: {sweep.num_gpus}" if are_on_cpus(outcomes) else f"Total GPUs: {sweep.num_gpus}",
        "",
        "Results:",
        "--------",
        "",
    ]
    for outcome in outcomes:
        lines += [*_scenario(outcome), ""]
    table = brief_table(entries_of([Run(Path(), sweep, tuple(outcomes), is_sweep=True)]), width)
    lines += [*table.split("\n"), ""] if table else []
    lines += run_spread_lines(outcomes)
    measured = [outcome for outcome in outcomes if outcome.median_s]
    if measured and not any(outcome.bound for outcome in measured):
        lines += ["No lower bounds: no cluster's link speeds were given (--cluster NAME, see configs/clusters)", ""]
    return plain_lines([*lines, counts_line(outcomes)])


def counts_line(outcomes: Sequence[Outcome]) -> str:
    """`7 scenarios: 5 ok, 1 failed, 1 refused`, or `2 scenarios in 4 runs: 4 ok`."""
    counts = Counter(outcome.status for outcome in outcomes)
    parts = ", ".join(f"{counts[status]} {status.text}" for status in COUNTED if counts[status])
    scenarios = by_scenario(outcomes)
    runs = f" in {len(outcomes)} runs" if any(scenario.has_runs for scenario in scenarios) else ""
    return f"{len(scenarios)} scenario{'' if len(scenarios) == 1 else 's'}{runs}: {parts or 'none'}"


def side_text(side: SideSpec | None, status: Status, place: str = "GPU") -> str:
    """`TP=8, EP=4 (32 GPUs)`; ETP where it is not TP, PP and VPP where they are not 1. The title of a side of another
    library than Megatron-Core: `fsdp2 TP2 EP1 FSDP2 (4 GPUs)`.

    Without a side: the check before the run found no valid layout, or the run ended before it was recorded.
    """
    if side is None:
        checked = status in (Status.REFUSED, Status.SKIPPED)
        return "not a valid layout" if checked else "unknown, the run ended before it recorded its layouts"
    layout = side.layout
    parts = [f"TP={layout.tp}", f"EP={layout.ep}"]
    parts += [f"ETP={layout.etp}"] if layout.etp != layout.tp else []
    parts += [f"PP={layout.pp}"] if layout.pp > 1 else []
    parts += [f"VPP={layout.vpp}"] if layout.vpp > 1 else []
    text = side.title if side.options is not None else ", ".join(parts)
    return f"{text} ({side.world_size} {place}{'' if side.world_size == 1 else 's'})"


def _scenario(outcome: Outcome) -> list[str]:
    planned, tested = outcome.planned, outcome.tested
    lines = [f"Config: {planned.name}", f"  Source: {side_text(planned.source, planned.status, outcome.place)}"]
    if planned.uses_destination:
        lines.append(f"  Target: {side_text(planned.destination, planned.status, outcome.place)}")
    lines.append(f"  Mode: {planned.mode}, Method: {outcome.method}" if planned.refits else f"  {_measured(planned)}")
    if outcome.status is not Status.OK:
        lines.append(f"{outcome.status.text.upper()}: {outcome.reason}")
        lines += [f"Log: {outcome.log}"] if outcome.log else []
    if tested is not None and tested.summary is not None:
        times = [] if tested.is_partial else _times(tested.summary)
        lines += [*times, *headlines(outcome), *_plan(outcome), *_verification(outcome, tested)]
    if outcome.result is not None:
        lines += [*checkpoint_lines.summary_lines(outcome.result), *step_lines.summary_lines(outcome.result)]
    return lines


def _measured(planned: Planned) -> str:
    return f"Measured: {', '.join(planned.scenario.measurements)}" if planned.scenario else ""


def _times(summary: Summary) -> list[str]:
    """The lines that scripts search for: keep their wording."""
    return [
        f"Mean refit time: {1e3 * summary.mean_s:.2f} ms",
        f"Min refit time:  {1e3 * summary.min_s:.2f} ms",
        f"Max refit time:  {1e3 * summary.max_s:.2f} ms",
    ]


def _plan(outcome: Outcome) -> list[str]:
    lines, cost, bound = [], outcome.cost, outcome.bound
    if cost is not None:
        lines.append(
            f"Payload: {units.gb(cost.payload_bytes)} ({units.gb(cost.wire_bytes)} between {outcome.place}s, "
            f"{units.gb(cost.local_bytes)} within)"
        )
        busiest = cost.busiest
        lines += [f"Busiest rank: {busiest.rank} {busiest.direction} {units.gb(busiest.nbytes)}"] * bool(busiest.nbytes)
    if bound is not None and bound.seconds:
        cause = f" ({bound.limited_by})" if bound.limited_by else ""
        lines.append(f"Lower bound: {units.milliseconds(bound.seconds)}{cause}")
    return lines


def _verification(outcome: Outcome, engine: EngineResult) -> list[str]:
    if not engine.num_compared and not engine.wrong_passes:
        return ["Verification: none, no element was compared"]
    scenario = outcome.result.scenario if outcome.result else None
    how = " (every 16th row)" if scenario and scenario.verify is Verify.SAMPLE else ""
    verdict = "FAILED" if engine.fault else "PASSED"
    compared = f"{engine.num_compared:,} elements compared{how}, {engine.num_wrong:,} wrong"
    return ["; ".join([f"Verification: {verdict}, {compared}", *engine.wrong_passes])]
