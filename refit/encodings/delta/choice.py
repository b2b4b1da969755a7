"""The choice of `auto`: whether the next refit sends changes or everything. Pure, and made before anything is compared.

How long a refit takes that sends changes follows from the share that has changed, which is not known before it. So the
next share is taken to be the last one. A refit that sends everything without keeping a snapshot leaves nothing to
compare with: before changes can be sent again, one has to send everything and keep it (`BASE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

NUM_TRIALS = 2
"""Each way is tried so often before one is chosen: the first time may have set-up in it."""

LOOK_AGAIN = 64
"""After so many refits in a row that sent everything, the share is looked at again, with two refits."""

NUM_TO_DECIDE = 1 + 2 * NUM_TRIALS
"""Refits until both ways have been tried."""

NUM_REMEMBERED = 8
ALIKE = 1.5
"""Shares that differ by less than this factor take about as long."""


class Way(str, Enum):
    """What one refit sends: changes; everything, keeping it as the base of changes; or everything."""

    CHANGES = "changes"
    BASE = "base"
    EVERYTHING = "everything"


@dataclass(frozen=True, slots=True)
class Past:
    """One refit that has ended: seconds of the slowest rank, and the share that had changed where that was found."""

    way: Way
    seconds: float
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds: of a refit that sends everything, and of comparing with the snapshot what is sent."""

    full_s: float
    find_s: float


def choose(past: Sequence[Past], bounds: Bounds | None = None) -> Way:
    """The way of the next refit after those of `past`, the first one first."""
    if bounds is not None and bounds.find_s >= bounds.full_s:
        return Way.EVERYTHING  # comparing alone takes as long, as where links are as fast as memory
    if not past:
        return Way.BASE
    changes, full = ([each for each in past if each.way is way] for way in (Way.CHANGES, Way.EVERYTHING))
    has_base = past[-1].way is not Way.EVERYTHING
    if len(changes) < NUM_TRIALS:
        return Way.CHANGES if has_base else Way.BASE
    expected_s = _expected_s(changes)
    if bounds is not None and expected_s < bounds.full_s:
        return Way.CHANGES if has_base else Way.BASE
    if past[-1].way is Way.BASE:
        return Way.CHANGES  # it was made to be built on
    if len(full) < NUM_TRIALS:
        return Way.EVERYTHING
    if expected_s < min(each.seconds for each in full[-NUM_REMEMBERED:]):
        return Way.CHANGES if has_base else Way.BASE
    if all(each.way is Way.EVERYTHING for each in past[-LOOK_AGAIN:]) and len(past) > LOOK_AGAIN:
        return Way.BASE
    return Way.EVERYTHING


def _expected_s(changes: Sequence[Past]) -> float:
    """What sending changes takes at the last share: the fastest of late refits of about that share.

    The fastest, here and of those that sent everything: others may have had to wait for something else.
    """
    last = changes[-1].share or 0.0
    alike = (each for each in changes[-NUM_REMEMBERED:] if last / ALIKE <= (each.share or 0.0) <= last * ALIKE)
    return min(each.seconds for each in alike)
