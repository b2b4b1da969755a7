"""The table of several scenarios in a text summary: a row for each engine, narrow enough for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from refit import units
from refit.report.refits.entries import Entry
from refit.report.refits.headline import marked_ms, title, what_ran
from refit.report.terminal.grid import Column, fitted

FOLD = 30
BETWEEN = "*: a ratio between two methods, those that the rows name."


def brief_table(entries: Sequence[Entry], width: int) -> str:
    """The table with lines of at most `width` characters, and what its signs mean; empty for less than two scenarios.

    Rows are named by what ran, or by their scenarios where that is not enough to tell them apart.
    """
    entries = [entry for entry in entries if entry.outcome.planned.refits]
    if len({entry.outcome.planned.name for entry in entries}) < 2:
        return ""
    names = [what_ran(entry.outcome, entry.name) for entry in entries]
    tested = [name for name, entry in zip(names, entries, strict=True) if entry.engine is None or entry.is_tested]
    if len(set(tested)) < len(tested):  # rows of baselines follow that of the same scenario
        names = [_named(entry) for entry in entries]
    rows = [[name, *_cells(entry)] for name, entry in zip(names, entries, strict=True)]
    # The first column and the last are always there; of the others those that hold something.
    kept = [place for place in range(len(COLUMNS)) if place in (0, len(COLUMNS) - 1) or any(row[place] for row in rows)]
    table = fitted([COLUMNS[place] for place in kept], [[row[place] for place in kept] for row in rows], width)
    return table + f"\n{BETWEEN}" * any(entry.ratio_between for entry in entries)


def _named(entry: Entry) -> str:
    """`one over nccl`, `one over gloo by Megatron-Core`."""
    by = f" by {title(entry.name)}" if entry.name and not entry.is_tested else ""
    return f"{entry.outcome.planned.name} over {entry.method}{by}"


COLUMNS = (
    Column("what ran", is_text=True, fold=FOLD),
    Column("median", "(ms)"),
    Column("speed", "(GB/s)"),
    Column("share", "(%)"),
    Column("wrong"),
    Column("ratio"),
    Column("status", is_text=True),
)


def _cells(entry: Entry) -> list[str]:
    engine, share = entry.engine, entry.share_of_bound
    rate = engine.bottleneck_gb_per_s if engine else None
    return [
        marked_ms(engine).partition(" ")[0],
        units.three_digits(rate) if rate else "",
        f"{100 * share:.0f}" if share is not None else "",
        units.short_count(engine.num_wrong) if engine and engine.num_compared else "",
        f"{entry.ratio:.2f}{'*' * bool(entry.ratio_between)}" if entry.ratio is not None else "",
        entry.status.text if engine is None or engine.doubt is None else engine.doubt,
    ]
