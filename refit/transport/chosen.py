"""ChosenProgram: sends changes or everything, by what refits before took."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

from refit.encodings.delta.choice import LOOK_AGAIN, Bounds, Past, Way, choose
from refit.transport.base import Program, RunReport
from refit.transport.encoded import EncodedProgram
from refit.transport.rendezvous import Rendezvous

WITHOUT = "everything was sent, which had been faster"
NUM_KEPT = 2 * LOOK_AGAIN


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one rank saw of a refit."""

    seconds: float
    num_compared: int
    num_changed: int


class ChosenProgram:
    """The `Program` of one rank, of two that move the same plan: `everything`, and `changes` of which the last encoding
    sends what has changed.

    The plan's first rank chooses for all, from what all have published of the refits before: one exchange through the
    store precedes a refit.
    """

    def __init__(
        self, peers: Rendezvous, everything: Program, changes: EncodedProgram, bounds: Bounds | None = None
    ) -> None:
        """`peers` has the ranks of the plan as members."""
        self._peers = peers
        self._everything, self._changes = everything, changes
        self._bounds = bounds
        self._past: deque[Past] = deque(maxlen=NUM_KEPT)
        self._number = 0
        self._last = Way.BASE

    @property
    def staging_bytes(self) -> int:
        return self._everything.staging_bytes + self._changes.staging_bytes

    def run(self) -> RunReport:
        """Raises RefitError as both programs do, and where a rank does not come."""
        if self._peers.rank not in self._peers.members:
            return RunReport()
        way = self._agreed()
        since = time.perf_counter()
        if way is Way.EVERYTHING:
            self._changes.forget(WITHOUT)
            report = self._everything.run()
            report = replace(report, remark=WITHOUT if report.wire_bytes_sent else None)
        else:
            report = self._changes.run()
        counts = report.counts
        seen = _Seen(time.perf_counter() - since, counts.get("num_compared", 0), counts.get("num_changed", 0))
        self._peers.publish(f"seen {self._number}", seen)
        self._last = way
        return report

    def close(self) -> None:
        self._everything.close()
        self._changes.close()

    def _agreed(self) -> Way:
        """The way of the next refit. Collective: every rank of the plan."""
        number = self._number = self._number + 1
        first = self._peers.members[0]
        if self._peers.rank != first:
            way: Way = self._peers.fetch(first, f"way {number}")
        else:
            if number > 1:
                self._remember([self._peers.fetch(rank, f"seen {number - 1}") for rank in self._peers.members])
            way = choose(list(self._past), self._bounds)
            self._peers.publish(f"way {number}", way)
        if number > 2:  # all ranks have been at the refit before, so the first one has read this, and they its choice
            self._peers.forget(f"seen {number - 2}")
            if self._peers.rank == first:
                self._peers.forget(f"way {number - 2}")
        return way

    def _remember(self, seen: list[_Seen]) -> None:
        compared, changed = sum(each.num_compared for each in seen), sum(each.num_changed for each in seen)
        share = changed / compared if self._last is Way.CHANGES and compared else None
        self._past.append(Past(self._last, max(each.seconds for each in seen), share))
