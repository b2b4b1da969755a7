"""Expected work of routed experts: how many of a rank's experts a batch touches, and which ranks a token has to reach.

A token goes to expert e with probability p_e (top-k over their number, or as measured). Where an expert has c copies,
each gets 1/c of its tokens, so that a slot is hit with q = p_e / c. Of T tokens, which choose independently,

    distinct experts of a rank    sum over its slots of 1 - (1 - q)^T
    pairs of token and expert     sum over its slots of q T
    a token reaches the rank      1 - product over its slots of (1 - q)

The first is exact. The last takes a token's choices as independent of each other. They are distinct, which makes it
reach a little more: for uniform routing C(E - n, k) / C(E, k) <= (1 - k / E)^n, so it is never too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slots:
    """The experts of one layer on the ranks that share them out: rank number `rank[i]` has a slot, `hit[i]`."""

    rank: npt.NDArray[np.int64]
    hit: Floats
    num_ranks: int

    @classmethod
    def of(cls, placed: Sequence[Sequence[int]], probabilities: Sequence[float]) -> Slots:
        """Of ranks with these experts, each with others."""
        held = [(rank, expert) for rank, experts in enumerate(placed) for expert in experts]
        copies = Counter(expert for _, expert in held)
        hit = [probabilities[expert] / copies[expert] for _, expert in held]
        return cls(np.array([rank for rank, _ in held], np.int64), np.array(hit), len(placed))

    def distinct(self, tokens: float) -> Floats:
        """Expected distinct experts of each rank, `[num_ranks]`, that `tokens` tokens go to."""
        return self._summed(-np.expm1(tokens * self._log_missed))

    def pairs(self, tokens: float) -> Floats:
        """Expected pairs of token and expert on each rank, `[num_ranks]`."""
        return self._summed(self.hit * tokens)

    def reached(self, groups: Sequence[Sequence[int]]) -> Floats:
        """How likely a token goes to an expert on some rank of each of `groups`, numbers of ranks: `[num_groups]`."""
        missed = self._summed(self._log_missed)
        return np.array([-np.expm1(missed[list(group)].sum()) for group in groups])

    @property
    def _log_missed(self) -> Floats:
        with np.errstate(divide="ignore"):  # an expert that every token chooses
            return np.asarray(np.log1p(-self.hit), np.float64)

    def _summed(self, values: Floats) -> Floats:
        return np.asarray(np.bincount(self.rank, values, self.num_ranks), np.float64)
