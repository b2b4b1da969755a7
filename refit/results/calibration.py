"""What `refit calibrate` measured of the links between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Link(str, Enum):
    """What bytes go over."""

    BETWEEN = "between hosts"
    WITHIN = "within a host"
    COPY = "within a rank"


class Pattern(str, Enum):
    """Which ranks send at a time: one, two to each other, or every rank of every host, each to one and from one."""

    PAIR = "one pair"
    BOTH_WAYS = "both ways"
    ALL = "all ranks"


@dataclass(frozen=True, slots=True)
class Speed:
    """`nbytes` from a rank to another took `seconds`, the median of several times, with all pairs of `pattern` at it.

    `method` moved them. `least_s` and `most_s` are the fastest and the slowest time.
    """

    link: Link
    pattern: Pattern
    method: str
    nbytes: int
    seconds: float
    least_s: float
    most_s: float

    @property
    def bytes_per_s(self) -> float:
        """Of one rank, in one direction."""
        return self.nbytes / self.seconds


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that was measured, on `num_hosts` of `ranks_per_host`. `machine` and `commit` say where, and by what.

    `read_bytes_per_s` and `bf16_flops_per_s` are what the slowest rank reads of its memory, and what its matrix
    products in BF16 reach, while all do.
    """

    speeds: tuple[Speed, ...]
    num_hosts: int
    ranks_per_host: int
    num_times: int
    date: str
    machine: str
    commit: str | None
    read_bytes_per_s: float | None = None
    bf16_flops_per_s: float | None = None

    def of(self, link: Link) -> float | None:
        """Bytes per second of a rank while all ranks send most; None where there is no such link."""
        found = [each for each in self.speeds if each.link is link and each.pattern is Pattern.ALL]
        return max(found, key=lambda each: each.nbytes).bytes_per_s if found else None
