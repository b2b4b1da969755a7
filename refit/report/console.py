"""The only place that writes to the terminal."""

from __future__ import annotations

import sys


def show(text: str) -> None:
    """Print to standard output at once, also where it is a file."""
    print(text, flush=True)


def show_error(message: str) -> None:
    """Print one error line to standard error."""
    print(f"error: {message}", file=sys.stderr, flush=True)
