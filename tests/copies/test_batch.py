"""Copies between views, and views of weights that get new storage."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from refit.copies.batch import CopyBatch, local_batches, weight_copies, zero_copies
from refit.copies.copy import Copy
from refit.memory.weights import Hook, LocalShard, LocalWeights, Part, generations
from refit.plan.box import Box
from refit.plan.plan import Transfer
from refit.plan.sharding import TensorSpec

SPEC = TensorSpec("w", (8, 6), "float32")
EXPERTS = TensorSpec("e", (4, 2, 3), "float32", stacked=True)


def _whole(spec: TensorSpec, data: torch.Tensor) -> LocalWeights:
    return LocalWeights([LocalShard(spec, Box.whole(spec.shape), data, data)])


def _experts(numbers: range, fill: float) -> LocalWeights:
    owners = [torch.full((2, 3), fill + number) for number in numbers]
    return LocalWeights(
        LocalShard(EXPERTS, Box((number, 0, 0), (1, 2, 3)), owner, owner.view(1, 2, 3))
        for number, owner in zip(numbers, owners, strict=True)
    )


def test_a_batch_copies_strided_views_and_casts() -> None:
    source = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    target = torch.full((4, 3), -1.0)
    batch = CopyBatch([Copy(target[:2], source[:2, 3:]), Copy(target[2:], source[2:, ::2])])
    assert batch.nbytes == 48
    batch.run()
    assert target.tolist() == [[3, 4, 5], [9, 10, 11], [12, 14, 16], [18, 20, 22]]


def test_an_empty_batch_runs() -> None:
    CopyBatch(()).run()


def test_weight_copies_meet_in_the_views_of_both_sides() -> None:
    data = torch.arange(48.0).view(8, 6)
    source = LocalWeights(
        LocalShard(SPEC, Box((row, 0), (4, 6)), part, part)
        for row, part in ((0, data[:4].clone()), (4, data[4:].clone()))
    )
    left, right = torch.zeros(8, 2), torch.zeros(8, 4)
    target = LocalWeights(
        [LocalShard(SPEC, Box((0, 0), (8, 2)), left, left), LocalShard(SPEC, Box((0, 2), (8, 4)), right, right)]
    )
    copies = list(weight_copies(SPEC, Box((2, 0), (4, 6)), source, target))
    assert len(copies) == 4
    CopyBatch(copies).run()
    found = torch.cat([left, right], 1)
    assert torch.equal(found[2:6], data[2:6])
    assert found[:2].abs().sum() + found[6:].abs().sum() == 0


def test_experts_are_found_by_number() -> None:
    source, target = _experts(range(4), 10.0), _experts(range(1, 3), 0.0)
    CopyBatch(weight_copies(EXPERTS, Box((1, 0, 0), (2, 2, 3)), source, target)).run()
    assert [shard.view.unique().tolist() for shard in target] == [[11.0], [12.0]]
    assert [view.box.offsets[0] for view in source.views("e", Box((0, 0, 0), (4, 2, 3)))] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="not held here"):
        target.views("e", Box((0, 0, 0), (2, 2, 3)))


def test_zeros_and_batching() -> None:
    target = _whole(SPEC, torch.ones(8, 6))
    rows = [Transfer(SPEC, "float32", Box((row, 0), (1, 6)), -1, 0) for row in (6, 7)]
    assert len(list(zero_copies(SPEC, rows[0].box, target))) == 1
    batches = local_batches((), rows, None, target, batch_bytes=24)
    assert len(batches) == 2
    for batch in batches:
        batch.run()
    assert next(iter(target)).view.sum(1).tolist() == [6.0] * 6 + [0.0] * 2


def test_generations_tell_every_asker_that_memory_has_moved() -> None:
    owner = torch.nn.Parameter(torch.arange(12.0).view(4, 3), requires_grad=False)
    spec = TensorSpec("p", (2, 3), "float32")
    memory = LocalWeights([LocalShard(spec, Box((0, 0), (2, 3)), owner, owner.detach()[2:])])
    before = generations(memory, None)
    assert generations(memory, None) == before
    owner.data = owner.data.clone() + 1
    assert memory.refresh()
    assert generations(memory, None) != before
    assert memory.views("p", Box((0, 0), (2, 3)))[0].data.data_ptr() == owner[2:].data_ptr()


class Noting(LocalWeights):
    """Weights whose hooks note the parts, and the value of the first element when they are called."""

    is_pipelined = True

    def __init__(self, shards: Iterable[LocalShard], noted: list[tuple[str, list[Box], float]]) -> None:
        super().__init__(shards)
        self._noted = noted

    def before_reading(self, parts: Iterable[Part]) -> Hook:
        return self._hook("before", parts)

    def after_writing(self, parts: Iterable[Part]) -> Hook:
        return self._hook("after", parts)

    def _hook(self, name: str, parts: Iterable[Part]) -> Hook:
        boxes, data = [box for _, box in parts], next(iter(self)).view
        return lambda: self._noted.append((name, boxes, data[boxes[0].offsets].item()))


def test_local_copies_call_the_hooks_of_what_they_read_and_write() -> None:
    noted: list[tuple[str, list[Box], float]] = []
    whole = Box((0, 0), (8, 6))
    source = Noting([LocalShard(SPEC, whole, *[torch.full((8, 6), 7.0)] * 2)], noted)
    target = Noting([LocalShard(SPEC, whole, *[torch.zeros(8, 6)] * 2)], noted)
    rows = [Transfer(SPEC, "float32", Box((row, 0), (1, 6)), 0, 0) for row in range(3)]
    zeros = [Transfer(SPEC, "float32", Box((7, 0), (1, 6)), -1, 0)]
    batches = local_batches(rows, zeros, source, target, batch_bytes=48)
    for batch in batches:
        batch.run()
    first, second = [rows[0].box, rows[1].box], [rows[2].box]
    assert noted == [
        ("before", first, 7.0),
        ("after", first, 7.0),
        ("before", second, 7.0),
        ("after", [*second, zeros[0].box], 7.0),
    ]


def test_both_parts_of_a_batch_wait_for_what_they_read() -> None:
    batch = CopyBatch(
        [Copy(torch.zeros(64), torch.ones(64)), Copy(torch.zeros(2, 2).t(), torch.ones(2, 2))], engine_bytes=64
    )
    called: list[str] = []
    batch.before = lambda: called.append("before")
    batch.run_large()
    batch.run_pieces()
    assert called == ["before"] * 2
