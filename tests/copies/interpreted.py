"""Runs tests of Triton kernels in a process of their own, since Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
"""For a test that calls `run_cases`: the interpreter is slow, and a busy machine slower."""


def run_cases(cases: Path) -> None:
    """Run the tests in the file `cases`, which must pass: compiled where there is a GPU, otherwise interpreted."""
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", str(LIMIT_S), str(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
