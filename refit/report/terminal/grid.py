"""Rows of text as a table for terminals and files, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refit.report.terminal.escaped import FILE_WIDTH, MAX_CELL, csv_cell, plain_lines
from refit.results.plain import plain

FOLD_WIDTH = 16
"""Text columns are folded to no less than this."""

GAP = 2
"""Blanks between columns: rich puts one on each side of a cell."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its title, and below it a unit or the title's second half.

    Text is aligned left and folded where there is little space, to no less than `fold`; figures are aligned right and
    kept whole.
    """

    title: str
    unit: str = ""
    is_text: bool = False
    fold: int = FOLD_WIDTH


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int = FILE_WIDTH) -> str:
    """A table with lines at most `width` wide, its cells made plain.

    Where the columns do not fit beside each other, the rest follow in a second table that repeats the first column.
    The first column names the rows: without a `fold` of its own it is folded only where it takes more than half of the
    width.
    """
    cells = [[plain(cell, MAX_CELL) for cell in row] for row in rows]
    natural = [_natural(column, [row[place] for row in cells]) for place, column in enumerate(columns)]
    needed = [min(size, column.fold) if column.is_text else size for column, size in zip(columns, natural, strict=True)]
    if columns[0].fold == FOLD_WIDTH:
        needed[0] = min(natural[0], max(width // 2, needed[0]))
    return "\n\n".join(
        _table(columns, cells, dict(zip(block, _widths(block, needed, natural, width), strict=True)))
        for block in _blocks(needed, width)
    )


def _natural(column: Column, cells: Sequence[str]) -> int:
    """The width of a column that is not folded."""
    return max(map(cell_len, (column.title, column.unit, *cells)))


def _widths(block: Sequence[int], needed: Sequence[int], natural: Sequence[int], width: int) -> list[int]:
    """The width of each column of a block: what is needed, and what the line has left, for the first that lack some."""
    spare = max(width - sum(needed[place] + GAP for place in block) + GAP, 0)
    widths = []
    for place in block:
        more = min(natural[place] - needed[place], spare)
        spare -= more
        widths.append(needed[place] + more)
    return widths


def _blocks(needed: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each table, by number. Every table begins with column 0."""
    blocks, used = [[0]], needed[0]
    for place in range(1, len(needed)):
        if used + GAP + needed[place] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = needed[0]
        blocks[-1].append(place)
        used += GAP + needed[place]
    return blocks


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Mapping[int, int]) -> str:
    """One table of the columns that `widths` has, each as wide as it says."""
    grid = Table(box=None, pad_edge=False, header_style="")
    has_units = any(columns[place].unit for place in widths)
    for place, size in widths.items():
        column = columns[place]
        heading = Text(f"{column.title}\n{column.unit}" if has_units else column.title)
        if column.is_text:
            grid.add_column(heading, justify="left", overflow="fold", width=size)
        else:
            grid.add_column(heading, justify="right", no_wrap=True, width=size)
    for row in rows:
        grid.add_row(*(Text(row[place]) for place in widths))
    return _rendered(grid, sum(widths.values()) + GAP * len(widths))


def _rendered(grid: Table, width: int) -> str:
    """A rich table as plain text, lines at most `width` wide."""
    console = Console(width=width, color_system=None, highlight=False, legacy_windows=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(grid)
    return plain_lines(line.rstrip() for line in capture.get().rstrip().split("\n"))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A table as GitHub renders it, the first `num_left` columns aligned left, the others right.

    Cells are Markdown already (`markdown_text`, `markdown_code`).
    """
    rules = ["---" if place < num_left else "---:" for place in range(len(header))]
    return plain_lines(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV (RFC 4180 quoting) without a newline at its end; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue().rstrip("\n")
