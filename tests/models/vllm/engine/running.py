"""Runs with a real vLLM, whose environment `make vllm` sets up, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from refit.models.vllm.engine.process import INSIDE
from refit.results.result import Result, read_result

ROOT = Path(__file__).resolve().parents[4]
TOKEN = "REFIT_TEST_TOKEN"

GIVEN = os.environ.get("REFIT_VLLM_PYTHON")
PYTHON = Path(GIVEN or ROOT / ".venv-vllm" / "bin" / "python")

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(GIVEN is None and not PYTHON.exists(), reason="no vLLM environment: make test-vllm"),
]
"""Marks of tests that start an engine. With REFIT_VLLM_PYTHON, as in `make test-vllm`, they never skip."""

SMALL = ["--vocab-size", "512", "--num-layers", "2", "--num-benchmark-warmup", "1", "--num-benchmark-iterations", "2"]


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    result: Result | None


def refit(
    folder: Path, *flags: str, python: Path | str = PYTHON, meanwhile: Callable[[str, Path], None] | None = None
) -> Run:
    """`refit run` of `flags` into a running vLLM. Checks that no process and no shared memory is left.

    `meanwhile` is called while it runs, with its token and the file that it prints into.
    """
    token, shared = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
    command = [sys.executable, "-m", "refit", "run", *SMALL, "--rl-inference-format", "vllm"]
    command += ["--rl-inference-engine-python", str(python), "--output-dir", str(folder), "--run-name", "run", *flags]
    log = folder / "log"
    environment = {**os.environ, TOKEN: token, "OMP_NUM_THREADS": "1"}
    with log.open("w") as printed:
        ran = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    if meanwhile is not None:
        meanwhile(token, log)
    code, output = ran.wait(timeout=540), log.read_text()
    left = leftovers(token, shared)
    assert left == [], f"{left} left behind; the run said:\n{output}"
    file = folder / "run.json"
    return Run(code, output, read_result(file) if file.exists() else None)


def leftovers(token: str, shared: set[str]) -> list[str]:
    """Processes of the run and new files of /dev/shm that are still there after some time."""
    deadline = time.monotonic() + 20
    while True:
        found = [f"process {pid}" for pid in processes(token)]
        new = [name for name in set(os.listdir("/dev/shm")) - shared if is_ours(name)]
        found += [f"/dev/shm/{name}" for name in new if not is_in_use(name)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def processes(token: str) -> list[int]:
    """Those that have inherited the token."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                environment = (place / "environ").read_bytes()
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"{TOKEN}={token}".encode() in environment and state != "Z":
                found.append(int(place.name))
    return found


def is_in_use(name: str) -> bool:
    """By a process that lives: of another run."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if f"/dev/shm/{name}" in (place / "maps").read_text():
                    return True
            except OSError:
                continue
    return False


def is_ours(name: str) -> bool:
    """Other tests run beside this one: only what vLLM or this suite names its memory."""
    return name.startswith(("refit-", "psm_", "vllm", "VLLM", "torch_"))


def faulty(folder: Path, fault: str) -> Path:
    """A Python that starts the engine with `fault` (`faulty_host.py`), and is vLLM's for anything else."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {PYTHON} "$@"\nshift\n'
        f'exec {PYTHON} {Path(__file__).with_name("faulty_host.py")} {INSIDE} {fault} "$@"\n'
    )
    script.chmod(0o755)
    return script
