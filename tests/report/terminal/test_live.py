"""The live line, on a pseudo terminal and beside one."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from refit.report.terminal.live import ERASE, LiveLine

ROOT = Path(__file__).resolve().parents[3]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_counts_seconds_until_it_is_cleared() -> None:
    terminal, clock = io.StringIO(), Clock()
    line = LiveLine(lambda: terminal, clock)
    line.draw("plan")
    clock.now = 3.0
    line.tick()
    line.erase()
    line.tick()
    line.clear()
    line.tick()
    assert terminal.getvalue() == "".join([f"{ERASE}plan", f"{ERASE}plan  3 s", ERASE, f"{ERASE}plan  3 s", ERASE])


def test_a_line_that_stands_still_is_not_drawn_again() -> None:
    terminal, clock = io.StringIO(), Clock()
    line = LiveLine(lambda: terminal, clock)
    line.draw("refit 1/5", ticking=False)
    clock.now = 9.0
    line.tick()
    assert terminal.getvalue() == f"{ERASE}refit 1/5"


def test_without_a_terminal_nothing_is_written_and_no_thread_started() -> None:
    line = LiveLine(lambda: None)
    line.draw("plan")
    line.clear(others=True)
    assert line._thread is None


def test_it_fits_the_width_and_cannot_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    terminal = io.StringIO()
    LiveLine(lambda: terminal).draw("check\x1b[2J a long name")
    shown = terminal.getvalue().removeprefix(ERASE)
    assert "\x1b" not in shown
    assert len(shown) == 11


def on_a_terminal(*words: str) -> str:
    """What a command writes to a terminal that is its standard output and error."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=100) == 0, shown
    return shown.decode()


def test_a_dry_run_says_that_it_plans_on_a_terminal_only() -> None:
    command = ["-m", "refit", "sweep", "plan", "--scenarios", "tiny"]
    shown = on_a_terminal(*command)
    assert f"{ERASE}planned 7 of 7 scenarios{ERASE}" in shown
    assert "planned" not in shown.rpartition(ERASE)[2]
    piped = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout + piped.stderr


@pytest.mark.slow
def test_a_run_shows_every_phase_from_the_first_second(tmp_path: Path) -> None:
    flags = ["--model", "tiny", "--num-layers", "1", "--moe-layer-freq", "1", "--vocab-size", "512"]
    shown = on_a_terminal("-m", "refit", "run", *flags, "--refit-method", "gloo", "--output-dir", str(tmp_path))
    phases = ["checking the scenario", "starting 2 ranks", "loading PyTorch", "connecting 2 ranks"]
    phases += ["build source model", "check destination sharding", "plan", "connect refit", "refit warm-up 1/2"]
    phases += ["refit 3/5, about "]
    places = [shown.index(f"{ERASE}{phase}") for phase in phases]
    assert places == sorted(places)
    assert "refit" not in shown.rpartition(ERASE)[2].partition("Result")[0]
    lines = shown.replace(ERASE, "\n").splitlines()
    assert [line for line in lines if line.startswith("Mean refit time: ")]
