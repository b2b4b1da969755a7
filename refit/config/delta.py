"""DeltaOptions: the settings of refits that send what has changed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction


class Pattern(str, Enum):
    """What changes together where changes are made up."""

    UNIFORM = "uniform"
    ROWS = "rows"
    EXPERTS = "experts"


class Snapshot(str, Enum):
    """Where a source keeps what it has sent: on the device of its weights, or in the host's pinned memory."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class DeltaOptions:
    """Before the n-th refit, `shares[n % len(shares)]` of the elements change."""

    shares: tuple[float, ...] = (0.01,)
    """Above 0 and at most 1."""
    pattern: Pattern = Pattern.UNIFORM
    """The units in which elements change."""
    snapshot: Snapshot = Snapshot.DEVICE
    """Where a source keeps what it has sent."""

    def share_of(self, iteration: int) -> float:
        """What has changed when refit `iteration` begins: all of it before the first one, 0."""
        return self.shares[iteration % len(self.shares)] if iteration else 1.0

    def changed_until(self, iteration: int) -> Fraction:
        """The shares of refits 1 to `iteration` added up. A share is the decimal number that it is written as."""
        exact = [Fraction(repr(share)) for share in self.shares]
        rounds, rest = divmod(iteration, len(exact))
        return rounds * sum(exact, Fraction(0)) + sum(exact[1 : rest + 1], Fraction(0))
