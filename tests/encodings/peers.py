"""Ranks of a plan that are threads of one process, or that tell one another nothing."""

from __future__ import annotations

import threading
from typing import Any


class Board:
    """What all ranks have published."""

    def __init__(self) -> None:
        self.notes: dict[tuple[int, str], Any] = {}
        self.changed = threading.Condition()


class ThreadPeers:
    """The `Peers` of rank `rank`, over a `board` that the other ranks have too."""

    def __init__(self, rank: int, board: Board | None = None) -> None:
        self.rank = rank
        self._board = board or Board()

    def publish(self, key: str, value: Any) -> None:
        with self._board.changed:
            self._board.notes[self.rank, key] = value
            self._board.changed.notify_all()

    def fetch(self, rank: int, key: str) -> Any:
        with self._board.changed:
            assert self._board.changed.wait_for(lambda: (rank, key) in self._board.notes, timeout=60)
            return self._board.notes[rank, key]

    def forget(self, key: str) -> None:
        self._board.notes.pop((self.rank, key), None)
