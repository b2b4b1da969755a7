"""The lists of token dispatchers for 256 GPUs: eight cells each, planned with the memory that training needs."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.results.status import Status
from refit.sweep.run import Allocation, plan
from refit.sweep.selection import select_file


@pytest.mark.parametrize("name", ["dispatcher_kimi_k2", pytest.param("dispatcher_deepseek_v3", marks=pytest.mark.slow)])
def test_a_large_campaign_has_eight_cells(name: str) -> None:
    sweep = plan(select_file(name, []), Allocation(256, 8, None))
    assert [each.status for each in sweep.scenarios] == [Status.READY] * 8
    assert {each.num_ranks for each in sweep.scenarios} == {256}
    assert all(each.memory_bytes is not None and each.memory_bytes > 40 << 30 for each in sweep.scenarios)
    cells = [parse([*each.flags, "--dry-run"]).scenario.steps for each in sweep.scenarios]
    found = {(each.micro_batch_size, each.dispatch.overlap, each.dispatch.arm) for each in cells if each}
    assert len(found) == 8
    assert {arm for _, _, arm in found} == {"alltoall", "flex/deepep"}
