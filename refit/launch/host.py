"""Runs the commands of a launcher: in this process, or in the script that has started it.

In a container there are no commands of Slurm. There the script, which runs outside, is asked to start them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from refit.errors import RefitError
from refit.report.terminal.console import show

TIMED_OUT = 124
"""Exit code of a command that was ended after its time, as timeout(1) has it."""

NOT_FOUND = 127

DISRUPTED = 75
"""Exit code of a command whose ranks were taken away, as by an eviction: the attempt counts as cancelled."""

CUT_SHORT = 76
"""The same where no further ranks can be started either, as after the end of a reservation: the sweep ends too."""

POLL_S = 0.1
TIMEOUT_GRACE_S, CANCEL_GRACE_S = 40.0, 15.0
"""How long a command may take to end. Slurm gives a cancelled job some 30 s (KillWait), so that one is short."""

REQUEST = "\x1e"
"""What a line for the script begins with."""


class Cancelled(RefitError):
    """A signal has told this process to stop. What it was waiting for has been ended."""


class Stop:
    """Whether a signal has told this process to stop."""

    told = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take note of SIGTERM and SIGINT in place of ending at once."""
        before = {number: signal.signal(number, self._take_note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take_note(self, *_: object) -> None:
        self.told = True


class Host(Protocol):
    """Where commands run."""

    def run(self, words: Sequence[str], log: Path, timeout_s: int) -> int:
        """Run a command, its output appended to `log`, for `timeout_s` at most (0: no limit).

        Returns its exit code as a shell has it, TIMED_OUT after that time. Raises Cancelled.
        """

    def output(self, words: Sequence[str]) -> tuple[int, str]:
        """The exit code and all output of a short command; NOT_FOUND and "" where there is no such command."""


class ThisProcess:
    """Commands are children of this process. They inherit its locks, so a lock is held while one of them runs."""

    def __init__(self, stop: Stop, *, shows_output: bool = False) -> None:
        """`shows_output`: what commands say goes on to this process's output, and only their errors to the log."""
        self._stop = stop
        self._shows_output = shows_output

    def run(self, words: Sequence[str], log: Path, timeout_s: int) -> int:
        with log.open("ab") as file:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=None if self._shows_output else file,
                    stderr=file,
                    start_new_session=True,  # signals go to all that it has started, Ctrl-C only to this process
                    close_fds=False,
                )
            except OSError as error:
                file.write(f"error: {words[0]}: {error.strerror}\n".encode())
                return NOT_FOUND
        deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
        while (code := _wait(process, POLL_S)) is None:
            if self._stop.told:
                _end(process, CANCEL_GRACE_S)
                raise Cancelled("cancelled")
            if time.monotonic() > deadline:
                _end(process, TIMEOUT_GRACE_S)
                return TIMED_OUT
        return code

    def output(self, words: Sequence[str]) -> tuple[int, str]:
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError:
            return NOT_FOUND, ""
        return done.returncode, done.stdout.decode(errors="replace")


class Script:
    """Asks the script for commands, a line of fields each: the time limit, the log and the words. It answers a line.

    The script ends this process's input where it has been told to stop. `folder` is one that both can write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, words: Sequence[str], log: Path, timeout_s: int) -> int:
        show(REQUEST + "\t".join([str(timeout_s), str(log), *words]))
        answer = sys.stdin.readline().strip()
        if not answer:
            raise Cancelled("cancelled")
        return int(answer)

    def output(self, words: Sequence[str]) -> tuple[int, str]:
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".said_") as file:
            code = self.run(words, Path(file.name), 0)
            return code, Path(file.name).read_text(encoding="utf-8", errors="replace")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, as a shell has it; None while the process runs."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a process and what it has started: with SIGTERM, after `grace_s` with SIGKILL."""
    _tell(process, signal.SIGTERM)
    if _wait(process, grace_s) is None:
        _tell(process, signal.SIGKILL)
        process.wait()


def _tell(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
