"""Shared memory of one host: when weights move into it, and how it is mapped. Moving weights is in test_transports."""

from __future__ import annotations

import mmap
import os
import resource

import pytest
import torch
from torch.distributed import HashStore

from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.planner import plan_refit
from refit.plan.sharding import Sharding, TensorSpec
from refit.transport.base import TransportOptions
from refit.transport.one_sided import shm
from refit.transport.one_sided.options import DIRECT, ShmOptions
from refit.transport.ranks import Ranks

NUM_PAGES = 1024


def weights(owner: torch.Tensor, rows: int) -> LocalWeights:
    """One shard, the first `rows` of `owner`."""
    tensor = TensorSpec("w", (rows, owner.shape[1]), "float32")
    return LocalWeights([LocalShard(tensor, Box.whole(tensor.shape), owner, owner.detach()[:rows])])


@pytest.mark.parametrize("padding", [0, 2])
def test_weights_move_into_the_heap_when_the_first_refit_begins(padding: int) -> None:
    source, destination = torch.rand(4, 3), torch.full((4 + padding, 3), 7.0)
    sides = weights(source, 4), weights(destination, 4)
    plan = plan_refit(*(Sharding.from_ranks({0: side.rank_sharding}) for side in sides))
    options = TransportOptions(timeout_s=5, own=ShmOptions(DIRECT))
    at_first = destination.data_ptr()
    program = shm.SharedMemoryTransport().prepare(plan, Ranks(0, 1, HashStore(), ("here",)), *sides, options)
    assert destination.data_ptr() == at_first
    assert bool((destination == 7).all())
    program.run()
    in_heap = destination.data_ptr()
    assert in_heap != at_first
    torch.testing.assert_close(destination[:4], source, rtol=0, atol=0)
    assert bool((destination[4:] == 7).all()), "what no refit writes moves too"
    source.add_(1)
    program.run()
    assert destination.data_ptr() == in_heap
    torch.testing.assert_close(destination[:4], source, rtol=0, atol=0)
    program.close()
    assert destination.data_ptr() != in_heap
    torch.testing.assert_close(destination[:4], source, rtol=0, atol=0)


def test_memory_that_is_mapped_ahead_has_no_page_faults() -> None:
    path = shm.DIRECTORY / f"refit-test-{os.getpid()}"
    shm._create(path, NUM_PAGES * mmap.PAGESIZE)
    try:
        with path.open("r+b") as file:
            mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    finally:
        path.unlink()
    assert not mapped[: mmap.PAGESIZE].any()
    half = mapped.numel() // 2
    # Parts that overlap or touch, in any order, and a strided one.
    shm.map_ahead([mapped[half - 10 :], mapped[5:half], mapped[:half].view(2, -1)[:, 1:], mapped[:0]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mapped.fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < NUM_PAGES // 8
