"""Forks the ranks of one machine from a process that has imported what they need, in torchrun's place.

Ranks get torchrun's variables and meet at a store that the launcher hosts. It hands signals on, ends all ranks once one
has failed, and ends with torchrun's own report of that one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from refit.config.registry import AUTO, ENCODINGS, ENGINES, FORMATS, MEASUREMENTS, METHODS, load
from refit.config.scenario import Scenario
from refit.errors import RefitError

HOST = "localhost"
SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
"""What the launcher takes over: the end of a rank, and the signals that it hands on."""

PATIENCE_S = 30.0
"""How long a rank may take to end once it was told to, as under torchrun."""

CUDA_ERROR_NOT_INITIALIZED = 3
"""What functions of the CUDA driver return before `cuInit` (`cuda.h`)."""


def load_libraries(scenario: Scenario) -> None:
    """Import what the ranks of `scenario` need, so that they share it.

    What cannot be imported is left to the ranks, which say why.
    """
    formats = [FORMATS[side.format] for side in scenario.sides.values()]
    modules = ["refit.bench.runner"]
    modules += [name for row in formats for name in (row.build, row.available) if name]
    modules += [row.transport for name, row in METHODS.items() if scenario.method in (name, AUTO)]
    encodings = [ENCODINGS[name] for name in scenario.encodings]
    modules += [name for row in encodings for name in (row.wire, row.bind, row.oracle) if name]
    modules += [ENGINES[name].engine for name in scenario.engines]
    modules += [MEASUREMENTS[name].measurement for name in scenario.measurements]
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name.partition(":")[0])
    for row in formats:
        if row.preload is not None:
            with contextlib.suppress(Exception):
                load(row.preload)(scenario, _device(scenario))


def _device(scenario: Scenario) -> torch.device:
    """Where the ranks will move weights, as `with_method` and `device_for` find for each of them."""
    if scenario.method != AUTO:
        return torch.device(scenario.device or METHODS[scenario.method].device)
    return torch.device(scenario.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def uses_cuda() -> bool:
    """Whether this process has initialised CUDA. No process forked from it could use a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != CUDA_ERROR_NOT_INITIALIZED


def launch(num_ranks: int, run: Callable[[], int]) -> None:
    """Fork `num_ranks` ranks, each of which ends with the exit code that `run()` returns, and wait for all.

    Returns where all have ended with 0. Raises ChildFailedError where one has failed, SystemExit where a signal told
    the launcher to stop, and RefitError where not all can be forked.
    """
    listener = socket.create_server((HOST, 0), backlog=2 * num_ranks)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child's first product hangs where the parent has threads for its own
    # A collection in a child would write to every object, and so copy all that it shares with the others.
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes now waits until it can be handed on
    ranks: dict[int, int] = {}
    for rank in range(num_ranks):
        try:
            pid = os.fork()
        except OSError as error:
            raise RefitError(
                f"rank {rank} of {num_ranks} could not be forked: {error.strerror}: use fewer ranks, or raise the "
                "limits of processes (ulimit -u) and memory"
            ) from error
        if pid == 0:
            port = listener.getsockname()[1]
            listener.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            torch.set_num_threads(num_threads)
            _name(f"refit rank {rank}")
            os.environ.update(rank_variables(rank, num_ranks, port))
            _end(_exit_code(run))
        ranks[pid] = rank
    gc.unfreeze()
    # The store has threads and connections, which no rank may inherit. Ranks that are early wait in the backlog.
    port = listener.getsockname()[1]
    store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    signals = _Signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _wait(ranks, signals)
    del store


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank of one machine."""
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")},
        **{name: str(num_ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher hosts the store, not rank 0
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "REFIT_START": "fork",
    }


def _name(text: str) -> None:
    """Name this process, as `top` shows it. Its command line is that of the launcher."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(text, encoding="ascii")


def _exit_code(run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return 1


def _end(code: int) -> NoReturn:
    """End a rank. Python's own way out touches every object, and so copies what the ranks share."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(ranks: dict[int, int], signals: _Signals) -> None:
    """Wait for `ranks`, by process, as `launch` says."""
    failure: tuple[int, ProcessFailure] | None = None
    stopped = False
    deadline = float("inf")
    while ranks:
        ended = [(ranks.pop(pid), pid, code) for pid, code in _ended(ranks)]  # all of them, before others are told
        for rank, pid, code in ended:
            if code != 0 and failure is None and not stopped:
                failure = rank, ProcessFailure(rank, pid, code, error_file="")
                deadline = _tell(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            _tell(ranks, signal.SIGKILL)
            deadline = float("inf")
        for number in signals.wait(deadline - time.monotonic()) if ranks else ():
            stopped = stopped or failure is None
            deadline = _tell(ranks, number)
    if failure is not None:
        raise ChildFailedError("refit run", dict([failure]))
    if stopped:
        sys.exit(1)


def _ended(ranks: dict[int, int]) -> list[tuple[int, int]]:
    """The processes that have ended since, with their exit codes: below zero for a signal."""
    found = [os.waitpid(pid, os.WNOHANG) for pid in ranks]
    return [(pid, os.waitstatus_to_exitcode(status)) for pid, status in found if pid]


def _tell(ranks: dict[int, int], number: int) -> float:
    """Send a signal to all ranks that run. Returns the time at which they must have ended."""
    for pid in ranks:
        os.kill(pid, number)
    return time.monotonic() + PATIENCE_S


class _Signals:
    """Takes over the signals that tell this process to stop, and wakes up when a child ends."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        for end in (self._read, write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)

    def wait(self, timeout_s: float) -> list[int]:
        """Wait until a signal comes, `timeout_s` at most. Returns those received, without those of children."""
        select.select([self._read], [], [], None if timeout_s == float("inf") else max(0.0, timeout_s))
        with contextlib.suppress(BlockingIOError):
            return [number for number in os.read(self._read, 256) if number != signal.SIGCHLD]
        return []
