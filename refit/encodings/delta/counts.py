"""Counts: what one rank packed in a refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counts:
    """Elements compared, or sent whole; those that had changed; bytes that say where, and bytes of values.

    Of a full refit it is not known what has changed.
    """

    num_compared: int = 0
    num_changed: int = 0
    place_bytes: int = 0
    value_bytes: int = 0

    def begin(self) -> None:
        self.num_compared = self.num_changed = self.place_bytes = self.value_bytes = 0

    def add(self, num: int, changed: int, place_bytes: int, value_bytes: int) -> None:
        self.num_compared += num
        self.num_changed += changed
        self.place_bytes += place_bytes
        self.value_bytes += value_bytes

    def as_mapping(self) -> Mapping[str, int]:
        return asdict(self)
