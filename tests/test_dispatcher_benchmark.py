"""The campaign of token dispatchers on one host: its runs fit and come in the order of their importance."""

from __future__ import annotations

import pytest

from benchmarks.campaign import memory_bytes
from benchmarks.dispatchers import IMPLEMENTATIONS, OVERLAP, Campaign
from refit.cli.parsing import parse
from refit.results.sweep import check_name

H200_BYTES = 139 << 30


@pytest.mark.parametrize("num_gpus", [4, 8])
def test_every_run_fits_an_h200(num_gpus: int) -> None:
    """With 10 % left for what the estimate does not count: gathered tokens, the allocator's gaps."""
    cases = list(Campaign(num_gpus, implementations=tuple(IMPLEMENTATIONS)).cases())
    for case in cases:
        assert 10 << 30 < memory_bytes(case, num_gpus) < 0.9 * H200_BYTES, case.name
        check_name(case.name, "case")
    overlapped = sum(OVERLAP in case.flags for case in cases)
    assert overlapped == 3, "local layers, those of Transformer Engine, and these with delayed weight gradients"
    assert len({case.name for case in cases}) == len(cases) == 2 * 2 * 2 * 3 + 1 + overlapped


def test_flex_runs_with_transformer_engine_where_nccl_ep_does() -> None:
    campaign = Campaign(2, micro_batches=(1, 4), tp=1, implementations=tuple(IMPLEMENTATIONS), has_nccl_ep=True)
    flex = {case.name: parse([*case.flags, "--dry-run"]).scenario for case in campaign.cases() if "flex" in case.name}
    assert list(flex) == ["TE_EP2_mb1_flex", "TE_EP2_mb4_flex"]
    for found in flex.values():
        assert found.steps is not None
        assert (found.steps.dispatch.arm, found.source.transformer_impl) == ("flex/ncclep", "transformer_engine")


def test_what_says_most_comes_first() -> None:
    names = [case.name for case in Campaign(4).cases()]
    assert names[:4] == ["EP4_mb1_alltoall", "EP4_mb1_allgather", "EP4_mb4_alltoall", "EP4_mb4_allgather"]
    assert names.index("TP2_EP2_mb4_allgather") < names.index("cycle") < names.index("EP4_mb2_alltoall")
