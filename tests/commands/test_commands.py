"""The console command: as a process of its own, and without what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refit.commands import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "refit", "bounds", "tiny"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=150)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141  # 128 + SIGPIPE, as for any program whose reader is gone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: COMMAND missing: refit --help says what it is\n"),
        (["sweep"], "error: STEP missing: refit sweep --help says what it is\n"),
        (["report"], "error: RUN_DIR missing: refit report --help says what it is\n"),
    ],
)
def test_what_is_missing_is_named_with_the_help_to_ask(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == message
