"""The launcher that forks ranks, with ranks that do next to nothing, each in a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from refit.bench import launcher
from refit.sweep.close import Cause, root_cause
from tests.ranks.waiting import read_until

PROGRAM = """
import os, signal, sys, time
from refit.bench import launcher
from refit.bench.launcher import launch

def wait():
    sys.stdout.write(f"rank {os.environ['RANK']} waits\\n")  # one write, so that lines stay apart
    sys.stdout.flush()
    time.sleep(100)
    return 0

"""


def started(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM + program]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `refit run` sets it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


def finished(program: str) -> tuple[int, str, str]:
    process = started(program)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def cause(code: int, errors: str) -> tuple[int, int | None]:
    found: Cause = root_cause(errors.splitlines(), code)
    return found.exit_code, found.rank


def test_ranks_meet_at_the_launchers_store() -> None:
    program = """
def run():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    ranks = torch.tensor([dist.get_rank(), int(os.environ["LOCAL_RANK"])])
    dist.all_reduce(ranks)
    assert ranks.tolist() == [3, 3]
    assert dist.get_world_size() == int(os.environ["LOCAL_WORLD_SIZE"]) == 3
    sys.stdout.write(os.environ["REFIT_START"] + "\\n")  # one write, whatever the buffering
    dist.destroy_process_group()
    return 0

launch(3, run)
print("launched")
"""
    assert finished(program) == (0, "fork\nfork\nfork\nlaunched\n", "")


def test_ranks_share_what_a_collection_leaves_alone() -> None:
    program = """
import gc, re
ballast = [[number] for number in range(1_000_000)]

def run():
    gc.collect()
    private = sum(map(int, re.findall(r"Private_\\w+: +(\\d+) kB", open("/proc/self/smaps_rollup").read())))
    sys.stdout.write(f"{private < 30_000 or private}\\n")
    return 0

launch(2, run)
"""
    assert finished(program) == (0, "True\nTrue\n", "")


def test_the_first_rank_that_fails_is_reported_and_the_others_are_ended() -> None:
    code, _, errors = finished("launch(3, lambda: 4 if os.environ['RANK'] == '1' else wait())")
    assert cause(code, errors) == (4, 1)


def test_ranks_that_fail_at_once_are_one_failure() -> None:
    program = """
ended = launcher._ended
launcher._ended = lambda ranks: time.sleep(0.5) or ended(ranks)  # until all have
launch(3, lambda: 4)
"""
    code, _, errors = finished(program)
    assert cause(code, errors) == (4, 0)
    assert "ProcessLookupError" not in errors


def test_an_unexpected_error_has_its_traceback_and_is_reported() -> None:
    code, _, errors = finished("launch(2, lambda: 0 // int(os.environ['RANK']))")
    assert "ZeroDivisionError" in errors
    assert cause(code, errors) == (1, 0)


def test_a_rank_that_a_signal_ends_is_reported_with_it() -> None:
    code, _, errors = finished(
        "launch(3, lambda: os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '2' else wait())"
    )
    assert cause(code, errors) == (-signal.SIGKILL, 2)


def test_a_rank_that_does_not_end_is_killed() -> None:
    program = """
def run():
    if os.environ["RANK"] == "0":
        time.sleep(1)
        return 3
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return wait()

launcher.PATIENCE_S = 0.1
launch(2, run)
"""
    code, _, errors = finished(program)
    assert cause(code, errors) == (3, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on(number: signal.Signals) -> None:
    process = started("launch(2, wait)")
    assert process.stdout is not None
    for _ in range(2):
        read_until(process.stdout.readline, "waits")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "")


def test_ranks_that_cannot_be_forked_are_a_plain_error() -> None:
    """Those that were forked already are told to stop, as their launcher ends."""
    program = """
from refit.cli.torchrun import end_with_parent
from refit.errors import RefitError
fork, parent = os.fork, os.getpid()

def limited():
    if os.environ.pop("FORKED", None):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    os.environ["FORKED"] = "1"
    return fork()

def run():
    end_with_parent(parent)
    return wait()

os.fork = limited
try:
    launch(2, run)
except RefitError as error:
    print(error)
"""
    code, output, errors = finished(program)
    assert (code, errors) == (0, "")
    assert "rank 1 of 2 could not be forked: Resource temporarily unavailable: use fewer ranks" in output


LOADED = """
from refit.cli.parsing import parse
launcher.load_libraries(parse({flags!r}).scenario)
before = set(sys.modules)
assert os.listdir("/proc/self/task") == [str(os.getpid())], "threads do not outlive a fork"
print("megatron.core" in before, "transformers" in before)
"""


@pytest.mark.parametrize(
    ("flags", "loaded"),
    [
        (["--model=tiny", "--refit-method=gloo"], "True False"),
        (
            ["--model=tiny_qwen3", "--source-format=fsdp2", "--rl-inference-format=vllm", "--refit-method=shm"],
            "False True",
        ),
    ],
)
def test_what_a_scenario_needs_is_loaded_and_no_more(flags: list[str], loaded: str) -> None:
    assert finished(LOADED.format(flags=flags)) == (0, f"{loaded}\n", "")


@pytest.mark.parametrize(("answer", "expected"), [(0, True), (launcher.CUDA_ERROR_NOT_INITIALIZED, False)])
def test_a_process_that_uses_cuda_is_known(monkeypatch: pytest.MonkeyPatch, answer: int, expected: bool) -> None:
    driver = SimpleNamespace(cuDeviceGetCount=lambda _: answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: driver)
    assert launcher.uses_cuda() is expected


def test_a_process_without_the_cuda_driver_does_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not launcher.uses_cuda()
