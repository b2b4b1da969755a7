"""The campaign of trainers on one host: its runs fit, come in the order of their importance, and can be ranked."""

from __future__ import annotations

import pytest

from benchmarks.campaign import memory_bytes
from benchmarks.trainers import CONTENDERS, TrainerCampaign, contenders
from refit.cli.parsing import parse
from refit.report.steps.trainers import work
from refit.results.sweep import check_name

MOST_GIB = {1: 113, 2: 79, 4: 64, 8: 57}
"""What the fullest GPU needs at most by the estimate, on so many GPUs. An H200 has 139 GiB."""


@pytest.mark.parametrize("num_gpus", MOST_GIB)
def test_every_run_fits_an_h200(num_gpus: int) -> None:
    cases = list(TrainerCampaign(num_gpus, CONTENDERS).cases())
    needed = [memory_bytes(case, num_gpus) / 2**30 for case in cases]
    assert min(needed) > 10
    assert MOST_GIB[num_gpus] - 1 < max(needed) < MOST_GIB[num_gpus]
    for case in cases:
        check_name(case.name, "case")
    num_layouts = {1: 1, 2: 2, 4: 3, 8: 3}[num_gpus]
    assert len({case.name for case in cases}) == len(cases) == len(CONTENDERS) * num_layouts + 1


def test_what_says_most_comes_first() -> None:
    names = [case.name for case in TrainerCampaign(4, CONTENDERS).cases()]
    assert names[:4] == ["TP2_DP2_megatron_te", "TP2_DP2_fsdp2", "TP2_DP2_autotp", "TP2_DP2_megatron"]
    assert names.index("TP4_DP1_megatron") < names.index("TP1_DP4_megatron_te")
    assert names[-1] == "TP1_DP4_fsdp2_autocast"


def test_cpus_run_what_they_can() -> None:
    names = [each.name for each in contenders(cpu=True)]
    assert "megatron_te" not in names
    assert {"fsdp2", "megatron"} <= set(names)
    for case in TrainerCampaign(2, contenders(cpu=True), cpu=True).cases():
        assert memory_bytes(case, 2) < 1 << 30, case.name


def test_all_contenders_of_a_layout_are_ranked_together() -> None:
    """So that none is left out of the table: equal work but for the library and its settings."""
    cases = list(TrainerCampaign(4, CONTENDERS).cases())
    works = {case.name: work(parse([*case.flags, "--dry-run"]).scenario) for case in cases}
    for layout in ("TP2_DP2", "TP4_DP1", "TP1_DP4"):
        assert len({found for name, found in works.items() if name.startswith(layout)}) == 1
    assert len(set(works.values())) == 3
