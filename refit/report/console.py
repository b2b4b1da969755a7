"""The only place that writes to the terminal."""

from __future__ import annotations

import sys


def show(text: str) -> None:
    """Print to standard output and flush."""
    print(text, flush=True)


def show_error(message: str) -> None:
    """Print one error line to standard error."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def show_aside(text: str) -> None:
    """Print text for people to standard error, where a script reads standard output."""
    print(text, file=sys.stderr, flush=True)
