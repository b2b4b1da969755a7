"""What a table of results says beside its rows: hardware, model and versions, and what is equal in every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refit.report.refits.entries import Entry
from refit.report.refits.tables import COLUMNS, Shown

ALWAYS = ("scenario", "#wrong", "median (ms)")
"""Columns that every table has."""

EARLY = ("#wrong", "median (ms)", "ratio")
"""The first columns of figures, which stay in view where the others do not fit."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The columns that tell rows apart, and what all rows have in common, by title. Columns without a cell are in
    neither."""

    columns: tuple[Shown, ...]
    common: dict[str, str]


def kept(entries: Sequence[Entry], is_short: bool = False) -> Kept:
    """The columns of a table of `entries`, with those of text first and then the EARLY ones.

    A short one leaves out the scenarios' names where the other columns of text tell all rows apart.
    """
    columns, common = [], {}
    for column in sorted(COLUMNS, key=_place):
        cells = {column.cell(entry) for entry in entries}
        if column.title in ALWAYS or len(cells) > 1 or (len(entries) == 1 and cells != {""}):
            columns.append(column)
        elif cells - {""}:
            common[column.title] = cells.pop()
    others = [column for column in columns[1:] if column.is_text]
    if is_short and len({tuple(column.cell(entry) for column in others) for entry in entries}) == len(entries):
        del columns[0]
    return Kept(tuple(columns), common)


def _place(column: Shown) -> tuple[bool, int]:
    return not column.is_text, EARLY.index(column.title) if column.title in EARLY else len(EARLY)


def facts(entries: Sequence[Entry]) -> dict[str, str]:
    """Hardware, model and versions of the runs; several values of one are all named."""
    found = {
        "Hardware": list(dict.fromkeys(name for entry in entries if (name := hardware(entry)))),
        "Model": list(dict.fromkeys(entry.model for entry in entries if entry.model)),
        "Versions": list(
            dict.fromkeys(
                f"{name} {version}" for entry in entries for name, version in entry.environment.versions.items()
            )
        ),
    }
    return {name: ", ".join(values) for name, values in found.items() if values}


def hardware(entry: Entry) -> str:
    """The GPUs, or the CPU where the models were there."""
    environment, result = entry.environment, entry.outcome.result
    on_gpus = environment.gpus and result is not None and result.device != "cpu"
    return environment.gpus[0].name if on_gpus else environment.cpu or ""
