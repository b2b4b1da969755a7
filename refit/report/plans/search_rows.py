"""Rows of a search: layouts that are equal in every printed figure are one, under a name that says which they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from refit import units
from refit.predict.findings import Crossing, Findings, Found, Kind, Objective
from refit.report.terminal.grid import Column

Cells = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Layouts that are equal in `cells`, the best first: indices into `Findings.found`."""

    members: tuple[int, ...]
    cells: Cells
    is_best: bool


def merged(findings: Findings, cells: Callable[[Found], Cells]) -> list[Row]:
    """The rows of a search, in its order. Layouts of one row have the same source; any of them is in the Pareto set."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, found in enumerate(findings.found):
        groups.setdefault((found.source, cells(found)), []).append(index)
    return [
        Row(tuple(members), cells(findings.found[members[0]]), any(index in findings.pareto for index in members))
        for members in groups.values()
    ]


def shown_rows(findings: Findings, rows: Sequence[Row], top: int) -> list[Row]:
    """The Pareto set; where all layouts were planned, the first `top` rows too."""
    return [row for number, row in enumerate(rows) if row.is_best or (findings.every and number < top)]


def name_of(row: Row, findings: Findings, dtype: str | None) -> str:
    """`TP16, any EP x ETP = 4`; `vllm TP8 EP8 and 2 more`. All destinations end with `dtype`, which is left out."""
    members = [findings.found[index] for index in row.members]
    first = members[0]
    by_kind: dict[Kind, int] = {}
    for one in members:
        by_kind[one.kind] = by_kind.get(one.kind, 0) + 1
    text, others = first.destination.removesuffix(f" {dtype}"), len(members) - 1
    same = by_kind[first.kind]
    if same > 1 and same == findings.kinds.get(first.kind) and first.layout is not None:
        others -= same - 1
        words = [word for word in text.split() if not word.startswith(("EP", "ETP"))]
        text = f"{' '.join(words)}, any EP x ETP = {first.layout.ep * first.layout.etp}"
    return text + (f" and {others} more" if others else "")


def columns(objective: Objective, layouts: str, large: bool, crosses: bool) -> list[Column]:
    """The columns of a search's table, the first for names."""
    name = Column(f"  {layouts}", is_text=True)
    if objective is not Objective.REFIT:
        return [name, *(Column(*each) for each in _SERVED[objective])]
    moved = "(GB)" if large else "(MB)"
    crossing = [*(Column(each, moved) for each in ("between", "within", "direct", "least")), Column("relay")]
    return [
        name,
        Column("bound", "(ms)"),
        Column("floor", "(ms)"),
        Column("busiest", moved),
        Column("memory", "(GiB)"),
        Column("KV", "(GiB)"),
        Column("KV", "(tokens)"),
        *(crossing if crosses else [Column("wire", moved)]),
    ]


_REST = (("memory", "(GiB)"), ("KV", "(GiB)"), ("batch", "(most)"))
_SERVED: Mapping[Objective, Iterable[tuple[str, str]]] = {
    Objective.CYCLE: (
        ("cycle", "(s)"),
        ("decode", "(ms)"),
        ("tokens/s", ""),
        ("prefill", "(s)"),
        ("refit", "(ms)"),
        *_REST,
    ),
    Objective.DECODE: (("decode", "(ms)"), ("tokens/s", ""), ("refit", "(ms)"), *_REST),
}


def cells_of(findings: Findings) -> Callable[[Found], Cells]:
    """What fills the columns but the first, for layouts of this search."""
    large = is_large(findings.found)
    crosses = any(found.crossing for found in findings.found)
    if findings.objective is Objective.REFIT:
        return lambda found: _refit_cells(found, large, crosses)
    return lambda found: _served_cells(found, findings.objective)


def is_large(found: Sequence[Found]) -> bool:
    """Whether bytes are in GB."""
    return max(one.busiest.nbytes for one in found) >= 1e9


def _served_cells(found: Found, objective: Objective) -> Cells:
    rollouts, cycle = found.rollouts, found.cycle
    assert rollouts is not None
    assert cycle is not None
    step: Cells = (f"{1e3 * rollouts.decode.seconds:,.3g}", f"{rollouts.tokens_per_s:,.0f}")
    if objective is Objective.CYCLE:
        step = (f"{cycle.seconds:,.4g}", *step, f"{cycle.prefill_s:,.3g}")
    return (
        *step,
        f"{1e3 * found.bound.seconds:,.4g}" if found.bound else "-",
        f"{found.memory_bytes / 2**30:,.2f}",
        "-" if found.kv_room_bytes is None else f"{found.kv_room_bytes / 2**30:,.2f}",
        "-" if found.largest_batch is None else f"{found.largest_batch:,}",
    )


def _refit_cells(found: Found, large: bool, crosses: bool) -> Cells:
    scale = 1e9 if large else 1e6
    return (
        *(
            f"{1e3 * bound.seconds:,.{1 if large else 3}f}" if bound else "-"
            for bound in (found.bound, None if found.share is not None else found.floor)
        ),
        f"{found.busiest.nbytes / scale:,.2f}",
        f"{found.memory_bytes / 2**30:,.2f}",
        "-" if found.kv_room_bytes is None else f"{found.kv_room_bytes / 2**30:,.2f}",
        "-" if found.kv_tokens is None else units.count(found.kv_tokens),
        *(_crossing(found.crossing, scale) if crosses else (f"{found.wire_bytes / scale:,.1f}",)),
    )


def _crossing(crossing: Crossing | None, scale: float) -> Cells:
    if crossing is None:
        return ("-",) * 5
    moved = (crossing.between_bytes, crossing.within_bytes, crossing.direct_bytes, crossing.least_bytes)
    return (*(f"{nbytes / scale:,.1f}" for nbytes in moved), crossing.relay.value)
