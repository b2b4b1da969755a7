"""The lists that compare trainers: three libraries on the same model, ranks and batch."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.results.status import Status
from refit.sweep.run import Allocation, plan
from refit.sweep.selection import select_file


@pytest.mark.parametrize(("name", "num_ranks"), [("trainers", 8), ("trainers_tiny", 4)])
def test_three_trainers_do_the_same_work(name: str, num_ranks: int) -> None:
    sweep = plan(select_file(name, []), Allocation(num_ranks, num_ranks, None))
    assert {each.status for each in sweep.scenarios} == {Status.READY}
    assert {each.num_ranks for each in sweep.scenarios} == {num_ranks}
    scenarios = [parse([*each.flags, "--dry-run"]).scenario for each in sweep.scenarios[:3]]
    assert [each.source.format for each in scenarios] == ["megatron", "fsdp2", "autotp"]
    sizes = {(each.source.layout.tp, each.source.layout.dp, each.source.dtype) for each in scenarios}
    assert len(sizes) == 1
    assert len({repr((each.model, each.steps)) for each in scenarios}) == 1


def test_qwen3_32b_fits_with_its_optimizer() -> None:
    """The documents' model on 8 GPUs: weights, gradients, optimizer states and activations below 141 GB each."""
    sweep = plan(select_file("trainers", []), Allocation(8, 8, None))
    found = {each.name: each.memory_bytes for each in sweep.scenarios}
    assert all(nbytes is not None and 60 << 30 < nbytes < 130 << 30 for nbytes in found.values())
