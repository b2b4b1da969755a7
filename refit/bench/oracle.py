"""The oracle: fills weights with values that encode their position, and compares what arrived bit for bit.

The value at logical index `[..., row, column]` of a tensor is a hash of the tensor's key, the row's number, the column
and the iteration, so any shard can be filled or checked without building the whole tensor, on any device. Values are
finite (2**-7 <= |value| < 2), so that a filled model can also run a forward pass. They carry 11 (bfloat16), 14
(float16) or 27 bits (float32) of the hash: an element that came from a wrong place or iteration is found with
probability 1 - 2**-11 or better, so counts of misplaced elements are low by at most 0.05 %. Poison is never a value, so
an element that was not written is always found.

Where the source holds a checkpoint, its values are those of the files instead (`refit.bench.file_values`).

What is sent in place of weights may ask for other values, and make other values of them: every encoding has a part of
the oracle (`refit.encodings.oracle`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from refit.bench.file_values import file_values
from refit.config.registry import ENCODINGS, load
from refit.config.scenario import Scenario
from refit.encodings.oracle import PLAIN, Comparison, OraclePart
from refit.memory.rows import SAMPLE_STRIDE, Rows, rows_of
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.sharding import TensorSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One wrong element: its logical index in the global tensor, the expected value and the value found."""

    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True, slots=True)
class WrongTensor:
    """The number of wrong elements of one tensor on one rank, and the first of them."""

    key: str
    num_wrong: int
    first: Mismatch


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rank found in its destination weights."""

    num_compared: int
    wrong: tuple[WrongTensor, ...]

    @property
    def num_wrong(self) -> int:
        return sum(tensor.num_wrong for tensor in self.wrong)


@dataclass(slots=True)
class Tally:
    """Collects the differences of one destination."""

    num_compared: int = 0
    wrong: dict[str, WrongTensor] = field(default_factory=dict)

    def add(self, each: Comparison) -> None:
        """Compare as bits."""
        bits = _BITS[each.found.element_size()]
        differs = each.found.view(bits) != each.expected.view(bits)
        self.num_compared += differs.numel()
        num_wrong = int(differs.sum())
        if num_wrong:
            before = self.wrong.get(each.key)
            first = before.first if before else _first(each, differs)
            self.wrong[each.key] = WrongTensor(each.key, num_wrong + (before.num_wrong if before else 0), first)

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.num_compared, tuple(self.wrong.values()))


def part_of(scenario: Scenario) -> OraclePart:
    """The oracle's parts of all encodings that the scenario's refits go through, as one."""
    part: OraclePart = file_values(scenario) if scenario.source_weights is not None else PLAIN
    for name in scenario.encodings:
        made = ENCODINGS[name].oracle
        part = load(made)(part, scenario) if made is not None else part
    return part


def fill(memory: LocalWeights, iteration: int, part: OraclePart = PLAIN) -> None:
    """Write the values of `iteration` to every element of a source."""
    for shard in memory:
        for block in rows_of(shard):
            block.data.copy_(part.values(shard.tensor, block, iteration))


def poison(memory: LocalWeights) -> None:
    """Overwrite every element of a destination with all-ones bits (NaN), which no value has."""
    for shard in memory:
        shard.view.view(_BITS[shard.view.element_size()]).fill_(255 if shard.view.element_size() == 1 else -1)


def check(
    memory: Iterable[LocalShard],
    source: Mapping[str, TensorSpec],
    iteration: int,
    *,
    sample: bool = False,
    part: OraclePart = PLAIN,
) -> Verdict:
    """Compare shards of a destination, as bits, with the source's values of `iteration`.

    `source` has each tensor's dtype and first dim at the source. Expected values are cast from that dtype to the
    destination's, or what `part` makes of them. `sample` compares every 16th row only, or row of what `part` compares.
    """
    tally = Tally()
    held = LocalWeights(memory)
    start = iteration % SAMPLE_STRIDE if sample else None
    for shard in held:
        for each in part.comparisons(partial(_values, part, iteration), held, shard, source, start):
            tally.add(each)
    return tally.verdict


def _values(part: OraclePart, iteration: int, tensor: TensorSpec, block: Rows) -> torch.Tensor:
    return part.values(tensor, block, iteration)


def _first(each: Comparison, differs: torch.Tensor) -> Mismatch:
    row, column = (int(i) for i in differs.nonzero()[0])
    return Mismatch(each.index(row, column), float(each.expected[row, column]), float(each.found[row, column]))
