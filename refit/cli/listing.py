"""`--list`: the presets, clusters and scenario files that flags can name."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from refit.config import yaml_files
from refit.errors import RefitError
from refit.report.terminal.console import show, show_error, terminal_width

KINDS = {
    "models": "models (--model NAME)",
    "clusters": "clusters (--cluster NAME)",
    "scenarios": "lists of scenarios (refit sweep plan --scenarios NAME)",
}
"""The folders of `configs/`, and how each is headed."""


class _List(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        try:
            show(listing(width=terminal_width(sys.stdout)))
        except RefitError as error:
            show_error(str(error))
            parser.exit(int(error.exit_code))
        parser.exit()


def add_list(parser: argparse.ArgumentParser) -> None:
    """Add `--list`, which prints and ends, whatever else is given."""
    parser.add_argument("--list", action=_List, nargs=0, help="print the presets, clusters and lists of scenarios")


def listing(kinds: Sequence[str] = tuple(KINDS), width: int | None = None) -> str:
    """A heading per kind, and a line per file: its name and the first sentence of its first comment.

    With `width` the rest of a longer line stands below its sentence.
    """
    sections = []
    for kind in kinds:
        names = yaml_files.names(kind)
        indent = max(map(len, names), default=0) + 4
        filled = textwrap.TextWrapper(width or sys.maxsize, subsequent_indent=" " * indent, break_on_hyphens=False)
        lines = (filled.fill(f"{f'  {name}':{indent}}{yaml_files.summary(kind, name)}") for name in names)
        sections.append("\n".join([f"{KINDS[kind]}:", *lines]))
    return "\n\n".join(sections)
