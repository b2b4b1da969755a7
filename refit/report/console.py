"""The only place that writes to the terminal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from refit.report import live
from refit.report.neutral import MAX_LINE
from refit.results.plain import plain


def show(text: str) -> None:
    """Print to standard output and flush."""
    live.erase()
    print(text, flush=True)


def show_error(message: str) -> None:
    """Print one error line to standard error. What it quotes cannot break it or move the cursor."""
    live.erase()
    print(f"error: {plain(message, MAX_LINE)}", file=sys.stderr, flush=True)


def show_aside(text: str) -> None:
    """Print text for people to standard error, where a script reads standard output."""
    live.erase()
    print(text, file=sys.stderr, flush=True)


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
