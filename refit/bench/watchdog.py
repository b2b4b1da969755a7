"""The watchdog: a thread on every rank that ends the run when a peer is gone or time is up, and says whose fault it
was.

Each rank keeps a heartbeat and the name of its phase in the store that torch.distributed was started with. A rank that
fails says so there before it ends; a rank that was killed stops beating. Whoever notices first takes the verdict
(one compare-and-set), prints it and marks the result file; every other rank reads it and ends with the same exit code.
The thread works while the main thread is stuck in a collective or a device synchronisation, which no signal handler
or exception could interrupt.
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

from torch.distributed import Store  # type: ignore[attr-defined]

from refit.errors import ExitCode, RefitError

log = logging.getLogger(__name__)

BEAT_S = 0.5
SILENCE_S = 15.0
"""A rank that has not beaten for so long counts as gone. Long, because a busy machine may starve a live rank."""
ROLL_CALL_S = 2.5
"""Once something is known to be wrong, a rank that misses this many seconds of beats is the one to blame."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Which rank failed in which phase, and why. `exit_code` is what every rank ends with."""

    rank: int
    phase: str
    message: str
    exit_code: int = int(ExitCode.FAILED)

    def __str__(self) -> str:
        return f"rank {self.rank} failed in phase '{self.phase}': {self.message}"


class Watchdog:
    """Watches from `start()` to `stop()`. `on_failure` is called on the one rank that takes the verdict."""

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        timeout_s: float,
        on_failure: Callable[[Failure], None],
    ) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._on_failure = on_failure
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
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """End of the run: peers that stop beating from now on are finished, not dead."""
        self._phase = "done"
        self._beat()
        self._stopping.set()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._thread.join(timeout=2 * BEAT_S)

    def phase(self, name: str) -> None:
        """Enter a phase, which may last `timeout_s`, and let the others know: it may be this rank's last word."""
        self._phase, self._phase_since = name, time.monotonic()
        self._beat()

    def fail(self, error: BaseException) -> int:
        """Settle who is to blame for `error`, raised on this rank, and return the exit code. Does not return twice."""
        if not isinstance(error, RefitError):
            log.error("unexpected error on rank %d", self._rank, exc_info=error)
        message = str(error) if isinstance(error, RefitError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, RefitError) else ExitCode.FAILED
        return self._settle(Failure(self._rank, self._phase, message, int(code)))

    def _watch(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        while not self._stopping.is_set():
            readable, _, _ = select.select([self._wakeup_read], [], [], BEAT_S)
            if self._stopping.is_set():
                return
            try:
                failure = self._terminated() if readable else self._notice(seen)
            except Exception as error:  # the store is gone, and with it the run
                failure = Failure(self._rank, self._phase, f"lost the rendezvous store: {error}")
            if failure is not None:
                self._end(failure)

    def _notice(self, seen: dict[int, tuple[str, float]]) -> Failure | None:
        """One beat's look around: a declared failure, an overdue phase, a silent peer."""
        self._beat()
        if self._store.check(["refit/failure"]):
            return self._declared()
        if time.monotonic() - self._phase_since > self._timeout_s:
            return Failure(self._rank, self._phase, f"took longer than the timeout of {self._timeout_s:g} s")
        # One rank listens to all, all listen to one: traffic grows with the ranks, not with their square.
        peers = range(self._num_ranks) if self._rank == 0 else (0,)
        return self._silent(peers, seen, SILENCE_S)

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
                return Failure(peer, beat.split(" ", 1)[1], "died or was killed (it stopped answering)")
        return None

    def _terminated(self) -> Failure:
        """SIGTERM: from a launcher that saw a rank die, or from whoever cancels the job."""
        own = Failure(self._rank, self._phase, "was told to stop (SIGTERM)")
        return self._roll_call() or own

    def _settle(self, own: Failure) -> int:
        """Blame whoever failed first: a declared failure, a rank that no longer beats, or else this one."""
        try:
            failure = self._declared() if self._store.check(["refit/failure"]) else self._roll_call()
        except Exception as error:
            log.debug("no roll call, the store is gone: %s", error)
            failure = None
        self._end(failure or own)
        return own.exit_code

    def _roll_call(self) -> Failure | None:
        """Listen for a moment to all ranks; a declared failure or one that is silent all along is the cause."""
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

    def _end(self, failure: Failure) -> None:
        """Take the verdict if nobody has, then end this process at once: peers may be stuck for good."""
        with self._ending:
            mine = f"{self._rank} {json.dumps(asdict(failure))}".encode()
            try:
                verdict = self._store.compare_set("refit/failure", "", mine.decode())
            except Exception:  # without a store every rank speaks for itself
                verdict = mine
            if verdict == mine:
                with contextlib.suppress(Exception):
                    self._on_failure(failure)
            sys.stdout.flush()
            sys.stderr.flush()
            # Give a launcher no reason to call this rank the first to fail, nor the store's host to leave too early.
            if self._rank == 0 or verdict != mine:
                time.sleep(BEAT_S * 2)
            os._exit(_verdict(verdict).exit_code)


def _verdict(stored: bytes) -> Failure:
    """A verdict as stored: the rank that took it, then the failure."""
    return Failure(**json.loads(stored.decode().split(" ", 1)[1]))
