"""The table printed before a sweep, one row per scenario, and the line printed after each scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refit import units
from refit.config.scenario import Mode, ranks_text
from refit.report.refits.headline import headlines
from refit.report.terminal.escaped import FILE_WIDTH, plain_lines
from refit.report.terminal.grid import Column, fitted
from refit.results.outcomes import judged
from refit.results.result import Result
from refit.results.status import Status
from refit.results.sweep import Planned, Sweep
from refit.units import TimeUnit

LISTED = (Status.READY, Status.REFUSED, Status.SKIPPED, Status.OK, Status.WRONG_DATA, Status.FAILED, Status.WAIVED)
"""The statuses that the check before a run can give, and those that an interrupted run has left."""


def sweep_text(sweep: Sweep, width: int = FILE_WIDTH) -> str:
    """A title, the table, notes, and the full reason for each scenario that is refused or skipped."""
    title, sweep = _title(sweep), replace(sweep, scenarios=sweep.distinct)
    lines = [title, "", *_table(sweep, width).split("\n"), "", *_totals(sweep)]
    notes: dict[str, list[str]] = {}
    for planned in sweep.scenarios:
        for note in planned.notes:
            notes.setdefault(note, []).append(planned.name)
    lines += [f"Note ({_names(sweep, names)}): {note}" for note, names in notes.items()]
    for planned in sweep.scenarios:
        if planned.status is not Status.READY and planned.reason:
            lines.append(f"{planned.name} {planned.status.value}: {planned.reason}")
    return plain_lines(lines)


def outcome_lines(planned: Planned, result: Result) -> str:
    """The headlines of a scenario that has ended, each after its name."""
    return plain_lines(f"{planned.name}: {line}" for line in headlines(judged(planned, result)))


def _title(sweep: Sweep) -> str:
    several = sweep.num_gpus > sweep.gpus_per_node
    gpus = f"{sweep.num_gpus} GPUs" + (f" ({sweep.nodes} nodes of {sweep.gpus_per_node})" if several else "")
    judged = f"cluster {sweep.cluster}" if sweep.cluster else "no --cluster: neither memory nor time is judged"
    run_id = f"{sweep.run_id}, " if sweep.run_id else ""
    runs = f"{sweep.num_runs} runs of each, interleaved, " if sweep.num_runs > 1 else ""
    return f"{sweep.title}: {run_id}{len(sweep.distinct)} scenarios, {runs}{gpus}, {judged}"


@dataclass(frozen=True, slots=True)
class _Units:
    """The units of a table's figures: of bytes for a large model or a small one, of time for its longest bound."""

    moved: str
    num_bytes: float
    time: TimeUnit

    @classmethod
    def of(cls, scenarios: Sequence[Planned]) -> _Units:
        largest = max((planned.cost.payload_bytes for planned in scenarios if planned.cost), default=0)
        longest_s = max((planned.bound.seconds for planned in scenarios if planned.bound), default=0.0)
        time = TimeUnit("s", 1.0) if longest_s >= 1 else TimeUnit("ms", 1e-3)
        return cls("GB", 1e9, time) if largest >= 10e9 else cls("MB", 1e6, time)


def _table(sweep: Sweep, width: int) -> str:
    scale = _Units.of(sweep.scenarios)
    columns = [
        Column("scenario", is_text=True),
        Column("GPUs"),
        Column("nodes"),
        Column("payload", f"({scale.moved})"),
        Column("memory", "(GiB/GPU)"),
        Column("busiest", f"({scale.moved})"),
        Column("rank"),
        Column("bound", f"({scale.time.name})"),
        Column("status", is_text=True),
        # Last, as a name mostly says it: where the width is short they go into a second table.
        *(Column(title, is_text=True) for title in ("layouts", "mode", "method")),
    ]
    return fitted(columns, [_cells(planned, scale) for planned in sweep.scenarios], width)


def _cells(planned: Planned, scale: _Units) -> list[str]:
    cost, bound = planned.cost, planned.bound
    sides = (planned.source, planned.destination) if planned.uses_destination else (planned.source,)
    return [
        planned.name,
        _gpus(planned),
        str(planned.nodes or "-"),
        f"{cost.payload_bytes / scale.num_bytes:,.2f}" if cost else "-",
        f"{planned.memory_bytes / 2**30:.2f}" if planned.memory_bytes is not None else "-",
        f"{cost.busiest.nbytes / scale.num_bytes:,.2f}" if cost else "-",
        f"{cost.busiest.rank} {cost.busiest.direction}" if cost else "-",
        f"{bound.seconds / scale.time.seconds:.4g}" if bound else "-",
        planned.status.value,
        " -> ".join(side.title if side else "?" for side in sides),
        planned.mode if planned.uses_destination else "-",
        planned.way if planned.refits else "-",
    ]


def _gpus(planned: Planned) -> str:
    """`64 + 32 = 96`, `max(8, 4) = 8`, or one number where both sides are as large and shared."""
    if planned.source is None or planned.destination is None:
        return "-"
    if planned.mode == Mode.COLLOCATED.value and planned.source.world_size == planned.destination.world_size:
        return str(planned.num_ranks)
    return ranks_text(Mode(planned.mode), planned.source, planned.destination)


def _totals(sweep: Sweep) -> list[str]:
    counts = [(status, sum(planned.status is status for planned in sweep.scenarios)) for status in LISTED]
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
