"""Versions: what a source knows of its destinations before it sends them changes.

The n-th refit of a program leads to version n. Before anything is sent, each destination rank publishes the version
that it holds, and each source rank reads those of its destinations. It sends changes where all of them hold the version
that its snapshot has, and everything else. A rank holds no version from the beginning of a refit to its end, so one
that failed in between is followed by a full one. Every message names its base, and a destination applies none that
builds on another version than it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refit.encodings.base import Peers
from refit.encodings.delta.form import NO_BASE
from refit.errors import RefitError

FIRST = "nothing was sent before"
FAILED = "the refit before did not end"
MOVED = "weights have new storage"


@dataclass(slots=True)
class Held:
    """The version of what one rank has, a destination's weights or a source's snapshot: None for none, `reason` why."""

    version: int | None = None
    reason: str = FIRST

    def forget(self, reason: str) -> None:
        self.version, self.reason = None, reason


class Versions:
    """Those of one rank: `snapshot` where it sends to `destinations`, `weights` where it receives.

    While a refit runs, `version` is where it leads to, `base` what this rank's messages build on, NO_BASE for full
    ones, and `reason` why they are full. `expected` is what messages to this rank must build on.
    """

    def __init__(self, peers: Peers, destinations: Sequence[int], *, receives: bool) -> None:
        self._peers = peers
        self._destinations = destinations
        self._receives = receives
        self.snapshot, self.weights = Held(), Held()
        self.version = 0
        self.base = self.expected = NO_BASE
        self.reason: str | None = None

    @property
    def is_full(self) -> bool:
        return self.base == NO_BASE

    def begin(self) -> None:
        """Agree on the base of the next refit. Raises RefitError, naming the rank, where one does not come.

        Collective: every rank that sends or receives.
        """
        self.version += 1
        if self._receives:
            self._peers.publish(self._key(self.version), replace(self.weights))
            self._peers.forget(self._key(self.version - 2))  # all sources have read it: they have run since
        self.reason = self._why_full() if self._destinations else None
        sends_changes = self.reason is None and self.snapshot.version is not None
        self.base = self.snapshot.version if sends_changes and self.snapshot.version is not None else NO_BASE
        self.expected = NO_BASE if self.weights.version is None else self.weights.version
        for held in (self.snapshot, self.weights):
            held.forget(FAILED)

    def finish(self) -> None:
        """All messages of the refit have been packed, and applied, here."""
        self.snapshot.version = self.weights.version = self.version

    def check(self, version: int, base: int) -> None:
        """Raise RefitError where this rank's weights are not what a message builds on."""
        if version != self.version:
            raise RefitError(f"it leads to version {version}, this refit to {self.version}")
        if base not in (NO_BASE, self.expected):
            held = "no version" if self.expected == NO_BASE else f"version {self.expected}"
            raise RefitError(f"its changes are to version {base}, these weights have {held}")

    def _why_full(self) -> str | None:
        """Why this rank must send everything; None where all of its destinations hold what its snapshot has."""
        theirs = {rank: self._peers.fetch(rank, self._key(self.version)) for rank in self._destinations}
        if self.snapshot.version is None:
            return self.snapshot.reason
        for rank, held in theirs.items():
            if held.version is None:
                return f"rank {rank}: {held.reason}"
            if held.version != self.snapshot.version:
                return f"rank {rank} has version {held.version}, not {self.snapshot.version}"
        return None

    @staticmethod
    def _key(version: int) -> str:
        return f"version {version}"
