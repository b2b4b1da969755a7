"""Rows of text as a fixed-width table, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def fixed_width(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `num_left` of them aligned left, the others right."""
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
    console = Console(width=width, color_system=None, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A table as GitHub renders it, the first `num_left` columns aligned left, the others right."""
    rules = ["---" if place < num_left else "---:" for place in range(len(header))]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, rules, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV (RFC 4180 quoting) without a newline at its end; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")
