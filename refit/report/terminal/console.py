"""The only place that writes to the terminal."""

from __future__ import annotations

import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import TextIO

from refit.report.terminal import live
from refit.report.terminal.escaped import FILE_WIDTH, MAX_LINE
from refit.results.plain import plain

MIN_WIDTH = 40
"""A narrower terminal breaks lines by itself."""

USUAL_WIDTH = 80
"""Of terminals that do not know their width."""

STYLES = {
    r"\b(PASSED|ok)\b": "green",
    r"\b(FAILED|WRONG DATA|WRONG|SLOWER|MORE THAN|failed|wrong_data|wrong data)\b": "bold red",
    r"\b(WAIVED|UNVERIFIED|REFUSED|SKIPPED|MISSING|waived|unverified|refused|skipped|missing|unchecked)\b": "yellow",
    r"^warning:": "yellow",
    r"(?<![\d.,])[\d.,]+ (s|ms|us) median\b": "bold",
}
"""Words that have a colour on terminals."""

UNITS = r"%|(?:[mun]?s|x|bytes|[kMGT]?B(?:/s)?|[KMG]iB|[KMBT]|GPUs?)(?![\w-])"
BEFORE_UNIT = re.compile(rf"(?<=\d) (?={UNITS})|(?<=s) (?=median\b)")
"""The blank between a figure and its unit (`refit.units`), and before what has a style with them."""

KEPT_BLANK = "\xa0"
"""Stands for it while a line is broken: no place to break at."""


def show(text: str) -> None:
    """Print to standard output as it is, for programs and files, and flush."""
    _print(text, sys.stdout)


def show_text(text: str) -> None:
    """Print text for people: on a terminal in colour and broken to its width, elsewhere as it is."""
    show(_for_people(text, sys.stdout))


def _for_people(text: str, stream: TextIO) -> str:
    width = terminal_width(stream)
    return text if width is None else _coloured(wrapped(text, width), stream)


def table_width(stream: TextIO | None = None) -> int:
    """Characters that a line of a table may have: the terminal's width, in files FILE_WIDTH."""
    return terminal_width(stream or sys.stdout) or FILE_WIDTH


def terminal_width(stream: TextIO) -> int | None:
    """The width of the terminal behind a stream, COLUMNS first; None for a file or a pipe."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    try:
        found = int(given) if re.fullmatch("[0-9]{1,6}", given) else os.get_terminal_size(stream.fileno()).columns
    except OSError:
        found = 0
    return max(found or USUAL_WIDTH, MIN_WIDTH)


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken at blanks: the rest of a line is indented. Words stay whole.

    Figures stay on the line of their units.
    """
    return "\n".join(part for line in text.split("\n") for part in _wrapped_line(line, width))


def _wrapped_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    start = re.match(r"(# )?\s*", line)
    indent = f"{start[0] if start else ''}  "
    whole = BEFORE_UNIT.sub(KEPT_BLANK, line)
    parts = textwrap.wrap(whole, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [part.replace(KEPT_BLANK, " ") for part in parts]


def _coloured(text: str, stream: TextIO) -> str:
    """The text with a terminal's colour codes, unless NO_COLOR or TERM asks for none."""
    from rich.console import Console  # by commands that colour text only: it takes a tenth of a second
    from rich.text import Text

    console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
    styled = Text(text)
    for pattern, style in STYLES.items():
        styled.highlight_regex(re.compile(pattern, re.MULTILINE), style)
    with console.capture() as capture:
        console.print(styled, end="")
    return capture.get()


def show_error(message: str) -> None:
    """Print one error line to standard error. What it quotes cannot break it or move the cursor."""
    live.erase()
    print(f"error: {plain(message, MAX_LINE)}", file=sys.stderr, flush=True)


def show_aside(text: str) -> None:
    """Print text for people to standard error, where a script reads standard output."""
    _print(_for_people(text, sys.stderr), sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    """In one write, the newline included: lines of several processes in one log do not begin in one another."""
    live.erase()
    print(f"{text}\n", end="", file=stream, flush=True)


def ending_quietly(run: Callable[[], int]) -> int:
    """The exit code of `run`, with all output written.

    Where the reader of the output has closed it (`| head`), the exit code is the one that a shell gives for SIGPIPE.
    """
    try:
        try:
            return run()
        finally:
            live.clear()
            if sys.stdout is not None:  # closed before the start
                sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes its buffers when it ends, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
