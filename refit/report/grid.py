"""Rows of text as a fixed-width table, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from refit.report.neutral import MAX_CELL, csv_cell, plain_lines
from refit.results.plain import plain


def fixed_width(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `num_left` of them aligned left, the others right."""
    header, *rows = ([plain(cell, MAX_CELL) for cell in row] for row in (header, *rows))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < num_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


def rendered(grid: Table, width: int | None) -> str:
    """A rich table as plain text, lines at most `width` wide; None takes the terminal's width."""
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
