"""Follows the logs of all pods of a job, prints them, and takes from them the result and what gates ask for."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

from refit.launch.kubernetes.api import Api
from refit.launch.kubernetes.pod import RESULT_LINE, result_of
from refit.launch.kubernetes.values import Gate
from refit.report.terminal.console import show

RANK = re.compile(r"\[rank([0-9]+)\]:")
"""What torchrun puts before each line of a rank."""

RECONNECT_S = 1.0
DRAIN_S = 30.0
"""How long the last lines of containers that have ended may take."""


class Logs:
    """The logs of a job's pods, a thread for each."""

    def __init__(self, api: Api, gates: Sequence[Gate]) -> None:
        self._api = api
        self._gates = [(gate.name, re.compile(gate.pattern)) for gate in gates]
        self._threads: dict[str, threading.Thread] = {}
        self._ended: dict[str, threading.Event] = {}
        self._printing = threading.Lock()
        self._parts: dict[int, str] = {}
        self._num_parts = 0
        self.passed: dict[str, set[int]] = defaultdict(set)
        """The ranks that have printed a line that a gate asks for, by the gate's name."""

    def follow(self, pod: str) -> None:
        """Follow a pod whose container has started, unless it is followed already."""
        if pod not in self._threads:
            self._ended.setdefault(pod, threading.Event())
            self._threads[pod] = threading.Thread(target=self._follow, args=(pod,), daemon=True)
            self._threads[pod].start()

    def has_ended(self, pod: str) -> None:
        """Nothing comes from this pod beyond what its log has now."""
        self._ended.setdefault(pod, threading.Event()).set()

    def drain(self, *, all_pods: bool, patience_s: float = DRAIN_S) -> None:
        """Wait for the last lines of pods that have ended, or of all pods, `patience_s` at most."""
        if all_pods:
            for pod in self._threads:
                self.has_ended(pod)
        deadline = time.monotonic() + patience_s
        for pod, thread in self._threads.items():
            if self._ended[pod].is_set():
                thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def result(self) -> bytes | None:
        """The result file; None where it did not come, or not whole."""
        return result_of(self._parts, self._num_parts)

    def _follow(self, pod: str) -> None:
        last = ("", "")
        since: datetime | None = None
        ended = self._ended[pod]
        while True:
            is_last, seen = ended.is_set(), last  # asked before the log is: what it has then is all
            for stamp, line in self._api.log(pod, since):
                moment = _comparable(stamp)
                if moment > seen:
                    last = moment
                    self._take(line)
            if is_last:
                return
            if last[0]:
                since = datetime.fromisoformat(f"{last[0]}+00:00")
            ended.wait(RECONNECT_S)

    def _take(self, line: str) -> None:
        if found := RESULT_LINE.fullmatch(line.rstrip()):
            number, self._num_parts, part = int(found[1]), int(found[2]), found[3]
            self._parts[number] = part
            return
        with self._printing:
            show(line)
        if rank := RANK.match(line):
            for name, pattern in self._gates:
                if pattern.search(line):
                    self.passed[name].add(int(rank[1]))


def _comparable(stamp: str) -> tuple[str, str]:
    """A time of a log as a second and a fraction that compare as text: zeros at its end may be left out."""
    second, _, fraction = stamp.rstrip("Z").partition(".")
    return second, fraction.ljust(9, "0")
