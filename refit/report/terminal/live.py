"""The live line: what a command is doing now, in the last line of a terminal. Files and pipes never get it.

`refit run` and then rank 0 draw on one terminal, and each may be killed at any moment. So every drawing begins by
erasing the line, and nothing is changed that somebody would have to restore, such as a hidden cursor.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from refit import units
from refit.results.plain import plain

ERASE = "\r\x1b[2K"
TICK_S = 1.0


class LiveLine:
    """One line of `terminal()`, which is None where there is none. Lines are cut to its width."""

    def __init__(self, terminal: Callable[[], TextIO | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._lock = threading.Lock()
        self._text = ""
        self._since = 0.0
        self._ticking = False
        self._visible = False
        self._thread: threading.Thread | None = None

    def draw(self, text: str, *, ticking: bool = True) -> None:
        """Show `text`, and with `ticking` the seconds since, redrawn by a thread."""
        if self._terminal() is None:
            return
        with self._lock:
            self._text, self._since, self._ticking = text, self._clock(), ticking
            self._write()
        if ticking and self._thread is None:
            self._thread = threading.Thread(target=self._tick, name="refit-live-line", daemon=True)
            self._thread.start()

    def erase(self) -> None:
        """Make room for other output. A ticking line comes back by itself, any other with the next `draw`."""
        with self._lock:
            if self._visible:
                self._put(ERASE)
            self._visible = False

    def clear(self, *, others: bool = False) -> None:
        """Erase the line for good; with `others` also one that another process has left."""
        with self._lock:
            self._text = ""
            if self._visible or others:
                self._put(ERASE)
            self._visible = False

    def tick(self) -> None:
        """Draw the line again where it counts seconds."""
        with self._lock:
            if self._text and self._ticking:
                self._write()

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            self.tick()

    def _write(self) -> None:
        seconds = self._clock() - self._since
        elapsed = f"  {units.duration(seconds)}" if self._ticking and seconds >= TICK_S else ""
        # One column less than there are: a full line would wrap on some terminals.
        width = shutil.get_terminal_size().columns - 1
        self._put(f"{ERASE}{plain(self._text)[: max(0, width - len(elapsed))]}{elapsed}")
        self._visible = True

    def _put(self, text: str) -> None:
        terminal = self._terminal()
        if terminal is None:
            return
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            terminal.write(text)
            terminal.flush()


def this_terminal() -> TextIO | None:
    """Standard error where it is a terminal, since scripts read standard output; else standard output."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    return next((stream for stream in (sys.stderr, sys.stdout) if stream is not None and is_terminal(stream)), None)


def is_terminal(stream: TextIO) -> bool:
    """Whether text goes to a terminal."""
    return not stream.closed and stream.isatty()


_LINE = LiveLine(this_terminal)

draw, erase, clear = _LINE.draw, _LINE.erase, _LINE.clear
