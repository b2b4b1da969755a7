"""The watchdog: a thread on every rank that ends the run when a rank is gone or a phase takes too long.

Each rank writes a heartbeat and the name of its phase to the store through which the ranks have met. A rank that
fails writes its failure there before it ends. The heartbeat of a killed rank stops. The first rank to notice records
the failure (one compare-and-set), prints which rank failed and marks the result file. Every other rank reads the record
and ends with the same exit code. A silent rank on the same machine is killed: a stopped process handles no SIGTERM, and
its launcher would wait half a minute for it. The thread runs even while the main thread is blocked in a collective or a
device synchronisation, which no signal handler or exception can interrupt.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from refit.errors import ExitCode, RefitError
from refit.report.terminal import live
from refit.results.result import GONE_TEXT, STOPPED_TEXT, STORE_TEXT
from refit.transport.ranks import Ranks

log = logging.getLogger(__name__)

BEAT_S = 0.5
SILENCE_S = 15.0
"""A rank without a heartbeat for this long counts as gone. A busy machine may delay a live rank, so it is long.

With more than RANKS_PER_CORE ranks it is longer in proportion: 32 ranks per core went silent for 15 s while they
imported their libraries, which hold the interpreter's lock for tenths of a second of CPU time.
"""
RANKS_PER_CORE = 8
ROLL_CALL_S = 2.5
"""After a first sign of failure, a rank without a heartbeat for this long is taken as the cause."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Which rank failed in which phase, and why. Every rank ends with `exit_code`. `silent`: it stopped answering."""

    rank: int
    phase: str
    message: str
    exit_code: int = int(ExitCode.FAILED)
    silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} failed in phase '{self.phase}': {self.message}"


class Watchdog:
    """Watches from `start()` to `stop()`.

    `ranks.store` is a client for the watchdog alone, since a client serves one caller at a time.

    `on_failure` is called on the one rank that records the failure, or without a store on every rank. `on_exit` is
    called on every rank, with the recorded failure, right before the process ends.
    """

    def __init__(
        self,
        ranks: Ranks,
        timeout_s: float,
        on_failure: Callable[[Failure], None],
        on_exit: Callable[[Failure], None] = lambda _: None,
    ) -> None:
        self._store = ranks.store
        self._rank = ranks.rank
        self._num_ranks = ranks.size
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._on_exit = on_exit
        self._phase = "start"
        self._phase_since = time.monotonic()
        self._beats = 0
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_write, False)
        self._thread = threading.Thread(target=self._watch, name="refit-watchdog", daemon=True)

    def start(self) -> None:
        """Begin watching and take over SIGTERM. Call from the main thread."""
        # The C-level handler writes to this pipe at once, even while the main thread is inside a collective.
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        with contextlib.suppress(OSError):  # a system that does not say it; then a silent rank is not killed
            self._store.set(f"refit/process/{self._rank}", _process_name(os.getpid()))
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching at the end of the run. Other ranks then see this rank as finished, not as gone."""
        self._phase = "done"
        self._beat()
        self._stopping.set()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._thread.join(timeout=2 * BEAT_S)

    def phase(self, name: str) -> None:
        """Enter a phase, which may last `timeout_s`, and write its name to the store."""
        self._phase, self._phase_since = name, time.monotonic()
        self._beat()

    def fail(self, error: BaseException) -> int:
        """Find the cause of `error`, which was raised on this rank, and end this process with the exit code.

        An unexpected error is shown with its traceback where it is the cause. Where another rank failed first it is
        only what follows: a connection that was closed.
        """
        message = str(error) if isinstance(error, RefitError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, RefitError) else ExitCode.FAILED
        unexpected = None if isinstance(error, RefitError) else error
        return self._settle(Failure(self._rank, self._phase, message, int(code)), unexpected)

    def _watch(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        while not self._stopping.is_set():
            readable, _, _ = select.select([self._wakeup_read], [], [], BEAT_S)
            if self._stopping.is_set():
                return
            try:
                failure = self._terminated() if readable else self._notice(seen)
            except Exception as error:  # the store is gone, so the run is over
                failure = Failure(self._rank, self._phase, f"{STORE_TEXT}: {error}")
            if failure is not None:
                self._end(failure)

    def _notice(self, seen: dict[int, tuple[str, float]]) -> Failure | None:
        """Write a heartbeat, then look for a recorded failure, an overdue phase and a silent rank."""
        self._beat()
        if self._store.check(["refit/failure"]):
            return self._declared()
        if time.monotonic() - self._phase_since > self._timeout_s:
            return Failure(self._rank, self._phase, f"took longer than the timeout of {self._timeout_s:g} s")
        # Rank 0 checks all ranks, and all others check rank 0: traffic is linear in the number of ranks.
        peers = range(self._num_ranks) if self._rank == 0 else (0,)
        return self._silent(peers, seen, silence_s())

    def _silent(
        self, peers: range | tuple[int, ...], seen: dict[int, tuple[str, float]], limit_s: float
    ) -> Failure | None:
        now = time.monotonic()
        for peer in peers:
            if peer == self._rank:
                continue
            beat = self._read_beat(peer)
            if beat is None or beat.endswith(" done"):
                continue
            if seen.get(peer, ("", 0.0))[0] != beat:
                seen[peer] = (beat, now)
            elif now - seen[peer][1] > limit_s:
                return Failure(peer, beat.split(" ", 1)[1], f"{GONE_TEXT} (it stopped answering)", silent=True)
        return None

    def _terminated(self) -> Failure:
        """The failure behind a SIGTERM, which comes from a launcher that saw a rank die or from a cancelled job."""
        own = Failure(self._rank, self._phase, STOPPED_TEXT)
        return self._roll_call() or own

    def _settle(self, own: Failure, unexpected: BaseException | None) -> int:
        """End with the first failure: a recorded one, a rank without a heartbeat, or else this rank's own."""
        try:
            failure = self._declared() if self._store.check(["refit/failure"]) else self._roll_call()
        except Exception as error:
            log.debug("no roll call, the store is gone: %s", error)
            failure = None
        self._end(failure or own, unexpected if failure is None else None)
        return own.exit_code

    def _roll_call(self) -> Failure | None:
        """Check all ranks for ROLL_CALL_S. Return a recorded failure, or one of a rank that was silent throughout."""
        seen: dict[int, tuple[str, float]] = {}
        end = time.monotonic() + ROLL_CALL_S + BEAT_S
        while time.monotonic() < end:
            self._beat()
            if self._store.check(["refit/failure"]):
                return self._declared()
            failure = self._silent(range(self._num_ranks), seen, ROLL_CALL_S)
            if failure is not None:
                return failure
            time.sleep(BEAT_S / 2)
        return None

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"refit/beat/{self._rank}", f"{self._beats} {self._phase}")

    def _read_beat(self, rank: int) -> str | None:
        key = f"refit/beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _declared(self) -> Failure:
        return _verdict(self._store.get("refit/failure"))

    def _end(self, failure: Failure, unexpected: BaseException | None = None) -> None:
        """Record the failure unless one is recorded, then end this process at once: other ranks may never return.

        `unexpected` is the error behind a failure of this rank, logged where its failure is the one that is recorded.
        """
        with self._ending:
            mine = f"{self._rank} {json.dumps(asdict(failure))}".encode()
            try:
                verdict = self._store.compare_set("refit/failure", "", mine.decode())
            except Exception:  # without a store every rank reports its own failure
                verdict, unexpected = mine, None
            if verdict == mine:
                if unexpected is not None:
                    log.error("unexpected error on rank %d", self._rank, exc_info=unexpected)
                with contextlib.suppress(Exception):
                    self._on_failure(failure)
            live.clear()
            with contextlib.suppress(Exception):
                self._kill_silent(_verdict(verdict))
            sys.stdout.flush()
            sys.stderr.flush()
            # Exit late, so that a launcher does not report this rank as the first to fail. Rank 0 hosts the store.
            if self._rank == 0 or verdict != mine:
                time.sleep(BEAT_S * 2)
            with contextlib.suppress(Exception):
                self._on_exit(_verdict(verdict))
            os._exit(_verdict(verdict).exit_code)

    def _kill_silent(self, failure: Failure) -> None:
        """Kill the rank that stopped answering, where it is a process of this machine."""
        key = f"refit/process/{failure.rank}"
        if not failure.silent or failure.rank == self._rank or not self._store.check([key]):
            return
        name = self._store.get(key).decode()
        pid = int(name.rsplit(" ", 1)[1])
        if _process_name(pid) == name:
            os.kill(pid, signal.SIGKILL)


def silence_s() -> float:
    """After how many seconds without a heartbeat a rank counts as gone, with the ranks and cores of this machine."""
    ranks_per_core = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / len(os.sched_getaffinity(0))
    return SILENCE_S * max(1.0, ranks_per_core / RANKS_PER_CORE)


def _verdict(stored: bytes) -> Failure:
    """Decode a stored failure: the rank that recorded it, then the failure as JSON."""
    return Failure(**json.loads(stored.decode().split(" ", 1)[1]))


def _process_name(pid: int) -> str:
    """A name that no other process has, on this machine or another: boot, PID namespace, start time and PID.

    Raises OSError where there is no such process. Its start, in clock ticks after the boot, is field 22 of
    `/proc/<pid>/stat` (proc(5)); the fields are counted after the program's name, which may hold blanks.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    start = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {start} {pid}"
