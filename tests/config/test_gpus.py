"""Which GPU each rank uses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.gpus import GpuMap, planned_gpus


@pytest.mark.parametrize(
    ("gpus", "of_rank"),
    [
        (GpuMap(4), [0, 1, 2, 3]),
        (GpuMap(4, 2), [0, 1, 0, 1]),
        (GpuMap(3, 2), [0, 1, 0]),
        (GpuMap(3, 8), [0, 0, 0]),
        (GpuMap(2, 2), [0, 0, 1, 1]),
    ],
    ids=["one each", "both sides on each", "an odd rank", "all on one", "two hosts"],
)
def test_the_gpu_of_each_rank(gpus: GpuMap, of_rank: list[int]) -> None:
    assert [gpus.gpu_of(rank) for rank in range(len(of_rank))] == of_rank


def test_a_host_numbers_its_own_gpus() -> None:
    assert [GpuMap(4, 2).device_of(rank) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 4))
def test_no_gpu_has_more_ranks_than_allowed_and_none_is_idle(per_host: int, per_gpu: int, hosts: int) -> None:
    gpus = GpuMap(per_host, per_gpu)
    numbers = [gpus.gpu_of(rank) for rank in range(per_host * hosts)]
    counts = [numbers.count(gpu) for gpu in range(gpus.gpus_per_host * hosts)]
    assert sum(counts) == per_host * hosts
    assert max(counts) == gpus.most_ranks <= per_gpu
    assert min(counts) >= 1
    assert gpus.is_shared == (gpus.gpus_per_host < per_host)


def test_ranks_of_one_host_take_the_fewest_gpus_and_those_of_several_all() -> None:
    assert planned_gpus(6, 8, 4) == GpuMap(6, 4)
    assert planned_gpus(40, 8, 4) == GpuMap(32, 4)
    assert planned_gpus(6, 8, 1).is_shared is False
