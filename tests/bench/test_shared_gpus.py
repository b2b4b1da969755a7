"""Memory of ranks that share a GPU, with a GPU that answers as it is told."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from refit.bench.memory import PeakMemory
from refit.bench.session import Session
from refit.cli.parsing import parse
from refit.results.result import Environment
from refit.transport.ranks import Ranks

GPU = torch.device("cuda", 0)
FLAGS = ["--model", "tiny", "--tensor-model-parallel-size", "2", "--refit-method", "cuda-ipc", "--ranks-per-gpu"]


def session(ranks_per_gpu: int, device: torch.device = GPU) -> Session:
    scenario = parse([*FLAGS, str(ranks_per_gpu)]).scenario
    ranks = Ranks(0, 4, HashStore(), ("here",) * 4)
    return Session(scenario, ranks, device, cast(dist.ProcessGroup, None), cast(Environment, None))


@pytest.fixture(autouse=True)
def one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")


def test_bytes_of_ranks_add_up_on_the_gpu_that_they_share() -> None:
    assert session(2).on_gpus([1, 20, 300, None]) == (301, 20, 301, 20)
    assert session(4).on_gpus([1, 20, 300, None]) == (321,) * 4
    assert session(1).on_gpus([1, 20, 300, None]) == (1, 20, 300, None)
    assert session(4, torch.device("cpu")).on_gpus([1, 20, 300, None]) == (1, 20, 300, None)


@pytest.mark.parametrize(("is_shared", "extra"), [(False, 64 + 1000), (True, 64)])
def test_what_other_ranks_allocate_is_not_a_rank_s_own_peak(
    monkeypatch: pytest.MonkeyPatch, is_shared: bool, extra: int
) -> None:
    """The rank's allocator peaks 64 bytes above its weights, and 1,000 bytes outside it are taken meanwhile."""
    free = [10_000]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 512)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 512 + 64)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1024)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 20_000))
    memory = PeakMemory(GPU, is_shared=is_shared)
    with memory.watch():
        free[0] -= 1000
    assert memory.extra_bytes == extra
