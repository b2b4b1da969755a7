"""Wire: what crosses the wire in a refit, which need not be what its sides hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from refit.plan.box import Box
from refit.plan.box_array import IntArray
from refit.plan.plan import RefitPlan
from refit.plan.sharding import Sharding, TensorSpec

MaxBytes = Callable[[TensorSpec, Box], int]
"""The most bytes that a box of a tensor takes in a message. It must not grow where the box shrinks."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a refit sends where `share` of the weights has changed: about `nbytes` of each route, `[num_routes]`.

    `work_bytes` are as `Wire.work_bytes`.
    """

    share: float
    nbytes: IntArray
    work_bytes: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What one encoding sends: shardings of both sides that hold the same tensors, of the same dtypes.

    The plan is made between these, so planner, transports, bounds and dry run know nothing of the encoding.

    `max_bytes` is for an encoding that packs its messages itself. A message then has a header with its length, and
    takes at most the sum over its boxes. None: a message is as long as its weights, and has no header.
    `is_pipelined`: weights are made, or used, beside the transfer. `work` is what needs `memory_bytes`, as a word.
    """

    source: Sharding
    destination: Sharding
    max_bytes: MaxBytes | None = None
    is_pipelined: bool = False
    work: str = "encoding"

    def memory_bytes(self, plan: RefitPlan) -> Mapping[int, int]:
        """What the encoding needs on each rank, beside the models and staging. Ranks that need nothing are left out."""
        return {}

    def work_bytes(self, plan: RefitPlan) -> Mapping[int, int]:
        """Bytes that the encoding reads and writes on each rank, at least, beyond those of copies of what `plan` moves.

        A copy of n bytes reads n and writes n. Ranks without such bytes are left out.
        """
        return {}

    def forecasts(self, plan: RefitPlan) -> Sequence[Forecast]:
        """One for each share that is asked for; none where what is sent does not depend on what has changed."""
        return ()

    @property
    def most_memory_bytes(self) -> Mapping[str, Mapping[int, int]]:
        """The same, or more, found without a plan: for the ranks of the `source` and of the `destination`."""
        return {}
