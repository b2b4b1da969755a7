"""The table printed before a sweep, one row per scenario, and the line printed after each scenario."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.table import Table

from refit import units
from refit.config.scenario import Mode, ranks_text
from refit.report.grid import rendered
from refit.report.neutral import plain_lines
from refit.results.outcomes import judged
from refit.results.plain import plain
from refit.results.result import Result
from refit.results.status import Status
from refit.results.sweep import Planned, Sweep

WIDTH = 160

CHECKED = (Status.READY, Status.REFUSED, Status.SKIPPED)
"""The statuses that the check before a run can give."""


def sweep_text(sweep: Sweep) -> str:
    """A headline, the table, notes, and the full reason for each scenario that is refused or skipped."""
    headline, sweep = _headline(sweep), replace(sweep, scenarios=sweep.distinct)
    lines = [headline, "", *_table(sweep), "", *_totals(sweep)]
    notes: dict[str, list[str]] = {}
    for planned in sweep.scenarios:
        for note in planned.notes:
            notes.setdefault(note, []).append(planned.name)
    lines += [f"Note ({_names(sweep, names)}): {note}" for note, names in notes.items()]
    for planned in sweep.scenarios:
        if planned.status is not Status.READY:
            lines.append(f"{planned.name} {planned.status.value}: {planned.reason}")
    return plain_lines(lines)


def outcome_line(planned: Planned, result: Result) -> str:
    """`NAME: 45.23 ms, PASSED`, or one line with the reason why it failed or was waived."""
    return plain(_outcome_line(planned, result))


def _outcome_line(planned: Planned, result: Result) -> str:
    outcome = judged(planned, result)
    engine = outcome.tested
    if outcome.status is Status.WAIVED:
        return f"{planned.name}: WAIVED: {outcome.reason}"
    if outcome.status is not Status.OK or engine is None or engine.summary is None:
        return f"{planned.name}: FAILED: {outcome.reason}"
    return f"{planned.name}: {1e3 * engine.summary.mean_s:.2f} ms, {'PASSED' if engine.num_compared else 'UNVERIFIED'}"


def _headline(sweep: Sweep) -> str:
    several = sweep.num_gpus > sweep.gpus_per_node
    gpus = f"{sweep.num_gpus} GPUs" + (f" ({sweep.nodes} nodes of {sweep.gpus_per_node})" if several else "")
    judged = f"cluster {sweep.cluster}" if sweep.cluster else "no --cluster: neither memory nor time is judged"
    run_id = f"{sweep.run_id}, " if sweep.run_id else ""
    runs = f"{sweep.num_runs} runs of each, interleaved, " if sweep.num_runs > 1 else ""
    return f"{sweep.title}: {run_id}{len(sweep.distinct)} scenarios, {runs}{gpus}, {judged}"


@dataclass(frozen=True, slots=True)
class _Units:
    """The units of a table's figures, for a large model or a small one."""

    moved: str
    num_bytes: float
    time: str
    num_seconds: float


LARGE, SMALL = _Units("GB", 1e9, "s", 1.0), _Units("MB", 1e6, "ms", 1e-3)


def _table(sweep: Sweep) -> list[str]:
    largest = max((planned.cost.payload_bytes for planned in sweep.scenarios if planned.cost), default=0)
    scale = LARGE if largest >= 10e9 else SMALL
    grid = Table(box=None, pad_edge=False, header_style="", padding=(0, 1))
    for title, unit in (("scenario", ""), ("source", ""), ("destination", ""), ("mode", ""), ("method", "")):
        grid.add_column(f"{title}\n{unit}", overflow="fold")
    for title, unit in (
        ("GPUs", ""),
        ("nodes", ""),
        ("payload", scale.moved),
        ("memory", "GiB/GPU"),
        ("busiest", scale.moved),
        ("rank", ""),
        ("bound", scale.time),
    ):
        grid.add_column(f"{title}\n{f'({unit})' if unit else ''}", justify="right", no_wrap=True)
    grid.add_column("status\n", no_wrap=True)
    for planned in sweep.scenarios:
        grid.add_row(*_cells(planned, scale))
    return rendered(grid, WIDTH).splitlines()


def _cells(planned: Planned, scale: _Units) -> list[str]:
    cost, bound = planned.cost, planned.bound
    return [
        planned.name,
        planned.source.title if planned.source else "-",
        planned.destination.title if planned.destination else "-",
        planned.mode,
        planned.method,
        _gpus(planned),
        str(planned.nodes or "-"),
        f"{cost.payload_bytes / scale.num_bytes:,.2f}" if cost else "-",
        f"{planned.memory_bytes / 2**30:.2f}" if planned.memory_bytes is not None else "-",
        f"{cost.busiest.nbytes / scale.num_bytes:,.2f}" if cost else "-",
        f"{cost.busiest.rank} {cost.busiest.direction}" if cost else "-",
        f"{bound.seconds / scale.num_seconds:.4g}" if bound else "-",
        planned.status.value,
    ]


def _gpus(planned: Planned) -> str:
    """`64 + 32 = 96`, `max(8, 4) = 8`, or one number where both sides are as large and shared."""
    if planned.source is None or planned.destination is None:
        return "-"
    if planned.mode == Mode.COLLOCATED.value and planned.source.world_size == planned.destination.world_size:
        return str(planned.num_ranks)
    return ranks_text(Mode(planned.mode), planned.source, planned.destination)


def _totals(sweep: Sweep) -> list[str]:
    counts = [(status, sum(planned.status is status for planned in sweep.scenarios)) for status in CHECKED]
    lines = [", ".join(f"{number} {status.value}" for status, number in counts if number or status is Status.READY)]
    slowest = max(
        (planned for planned in sweep.scenarios), key=lambda planned: planned.bound.seconds if planned.bound else 0.0
    )
    if slowest.bound is not None:
        bound = slowest.bound
        lines.append(f"Longest lower bound: {slowest.name}, {units.seconds(bound.seconds)}: {bound.limited_by}")
    return lines


def _names(sweep: Sweep, names: list[str]) -> str:
    return "all" if len(names) == len(sweep.scenarios) else ", ".join(names)
