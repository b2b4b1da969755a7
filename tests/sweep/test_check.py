"""The check before a run: what a scenario needs, and what is refused before any GPU is spent."""

from __future__ import annotations

import re

import pytest

from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.errors import UsageError
from refit.predict.cpus import Machine
from refit.predict.dry_run import DryRunOptions
from refit.report.refits.sweep_table import sweep_text
from refit.results.status import Status
from refit.results.sweep import Sweep
from refit.sweep.check import Placement, check, checked, on_cpus, place
from refit.sweep.run import Allocation, plan
from refit.sweep.selection import Candidate, select_file, select_lines
from tests.report.factories import on_ranks_from, side

TINY = ("--model=tiny", "--refit-method=gloo")
TP2_EP2 = ("--tensor-model-parallel-size=2", "--expert-model-parallel-size=2")


def planned_lines(lines: list[str], num_gpus: int, *common: str, cluster: str | None = None) -> Sweep:
    return plan(select_lines(lines, common), Allocation(num_gpus, 8, cluster))


@pytest.mark.parametrize(
    ("num_ranks", "gpus_per_node", "expected"),
    [
        (6, 8, Placement(6, 1, 8)),
        (8, 8, Placement(8, 1, 8)),
        (96, 8, Placement(96, 12, 8)),
        (12, 8, Placement(12, 2, 8)),
        (6, 4, Placement(6, 2, 4)),
        (1, 8, Placement(1, 1, 8)),
        (12, None, Placement(12, 1, 12)),
    ],
)
def test_ranks_go_to_all_gpus_of_few_nodes(num_ranks: int, gpus_per_node: int | None, expected: Placement) -> None:
    assert place(num_ranks, gpus_per_node) == expected


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_gpu", "expected"),
    [(2, 2, Placement(2, 1, 2)), (6, 4, Placement(6, 1, 6)), (20, 2, Placement(20, 2, 16))],
)
def test_ranks_that_share_gpus_leave_none_idle(num_ranks: int, ranks_per_gpu: int, expected: Placement) -> None:
    assert place(num_ranks, 8, ranks_per_gpu) == expected


def test_a_sweep_counts_gpus_where_ranks_share_them() -> None:
    lines = ["2:2:1:1:collocated:cuda-ipc:a"]
    sweep = plan(select_lines(lines, ("--model=tiny", "--ranks-per-gpu=4")), Allocation(None, 8, "h200_nvlink"))
    (planned,) = sweep.scenarios
    assert (planned.status, planned.num_ranks, planned.ranks_per_node, sweep.num_gpus) == (Status.READY, 4, 4, 1)
    assert planned.bound is not None
    assert planned.bound.limited_by.startswith("GPU 0 copies ")


def test_cpus_share_no_gpu() -> None:
    flags, note = on_cpus(["--model=tiny", "--refit-method=cuda-ipc", "--ranks-per-gpu=2"])
    assert parse(flags).scenario.ranks_per_gpu == 1
    assert "shm stands in for cuda-ipc" in note


def test_a_scenario_that_is_ready() -> None:
    flags = (*TINY, *TP2_EP2, "--rl-inference-expert-model-parallel-size=1")
    planned = check(Candidate("a", flags), DryRunOptions(8, 8, load_cluster("h200_nvlink")))
    assert (planned.status, planned.reason, planned.flags) == (Status.READY, None, flags)
    assert (planned.source, planned.destination) == (side(2, 2), on_ranks_from(4, side(2, 1)))
    assert (planned.mode, planned.method) == ("non-collocated", "gloo")
    assert (planned.num_ranks, planned.nodes, planned.ranks_per_node) == (6, 1, 8)
    cost = planned.cost
    assert cost is not None
    assert cost.payload_bytes == cost.wire_bytes + cost.local_bytes
    assert (cost.busiest.rank, cost.busiest.direction) == (4, "receives")
    assert planned.bound is not None
    assert planned.bound.seconds == pytest.approx(cost.busiest.nbytes / 391e9)
    assert planned.bound.limited_by.startswith("rank 4 receives ")
    assert planned.bound.cluster == "h200_nvlink"
    assert planned.memory_bytes is not None
    assert planned.memory_bytes > 512 << 20


def test_without_a_cluster_there_is_no_bound() -> None:
    planned = check(Candidate("a", (*TINY, *TP2_EP2)), DryRunOptions(None, 8, None))
    assert (planned.status, planned.bound) == (Status.READY, None)
    assert planned.cost is not None


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            (*TINY, *TP2_EP2, "--rl-inference-expert-model-parallel-size=8"),
            "4 + 16 = 20 GPUs needed > 8 available: lower",
        ),
        ((*TINY, "--tensor-model-parallel-size=3"), "8 attention heads cannot be divided by TP size 3"),
        (("--model=tiny",), "--refit-method missing"),
        ((*TINY, "--source-world-size=3", "--tensor-model-parallel-size=2"), "3 ranks cannot be divided"),
    ],
)
def test_a_refused_scenario_keeps_its_reason(flags: tuple[str, ...], reason: str) -> None:
    refused = check(Candidate("a", flags), DryRunOptions(8, 8, None))
    assert refused.status is Status.REFUSED
    assert reason in (refused.reason or "")
    assert refused.cost is None
    skipped = check(Candidate("a", flags, is_cell=True), DryRunOptions(8, 8, None))
    assert (skipped.status, skipped.reason) == (Status.SKIPPED, refused.reason)


def test_a_refused_scenario_is_shown_with_its_layout() -> None:
    refused = check(Candidate("a", (*TINY, "--tensor-model-parallel-size=3")), DryRunOptions(None, 8, None))
    assert (refused.source, refused.num_ranks) == (side(3, 1), 6)


def test_a_model_that_does_not_fit_the_gpu_is_refused_and_the_others_are_not() -> None:
    lines = ["8:8:8:4:non-collocated:nvshmem:fits", "8:1:8:8:collocated:nccl:large"]
    sweep = planned_lines(lines, 128, "--model=kimi_k2", cluster="h100_ib400")
    assert [planned.status for planned in sweep.scenarios] == [Status.READY, Status.REFUSED]
    assert "h100_ib400 has 80.00 GB" in (sweep.scenarios[1].reason or "")
    assert "raise" in (sweep.scenarios[1].reason or "")


def test_a_model_provider_is_ready_without_figures() -> None:
    flags = ("--model-provider=examples.custom_model:build", "--refit-method=gloo", *TP2_EP2)
    planned = check(Candidate("a", flags), DryRunOptions(8, 8, None))
    assert (planned.status, planned.cost, planned.num_ranks) == (Status.READY, None, 8)
    too_many = check(Candidate("a", flags), DryRunOptions(4, 8, None))
    assert "8 GPUs needed > 4 available" in (too_many.reason or "")


def test_cells_that_make_no_sense_are_skipped_with_the_rule() -> None:
    sweep = plan(select_file("8gpu_axes", []), Allocation(8, 8, None))
    by_name = {planned.name: planned for planned in sweep.scenarios}
    assert by_name["source_TP_EP_2_2"].status is Status.READY
    assert "8 attention heads cannot be divided by TP size 3" in (by_name["source_TP_EP_3_1"].reason or "")
    assert "16 + 2 = 18 GPUs needed > 8 available" in (by_name["source_TP_EP_4_4"].reason or "")
    assert {planned.status for planned in sweep.scenarios} == {Status.READY, Status.SKIPPED}


def test_a_list_without_a_cell_that_makes_sense_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"all 15 scenarios are skipped, source_TP_EP_1_1: 1 \+ 2 = 3 GPUs needed > 1"):
        plan(select_file("8gpu_axes", []), Allocation(1, 8, None))


def test_the_plan_as_text() -> None:
    lines = [
        "2:2:2:1:non-collocated:gloo:ready_one",
        "2:2:2:4:non-collocated:gloo:too_large",
        "3:1:1:1:collocated:gloo:odd",
    ]
    text = sweep_text(planned_lines(lines, 8, "--model=tiny", cluster="h200_nvlink"), 160)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert rows["MoE:"] == "MoE: 3 scenarios, 8 GPUs, cluster h200_nvlink"
    assert rows["ready_one"].split()[:6] == ["ready_one", "4", "+", "2", "=", "6"]
    assert rows["ready_one"].split()[-7:] == ["TP2", "EP2", "->", "TP2", "EP1", "non-collocated", "gloo"]
    assert "1 ready, 2 refused" in text
    assert rows["too_large"].startswith("too_large refused: 4 + 8 = 12 GPUs needed > 8 available: lower")
    assert rows["odd"].startswith("odd refused: source: 8 attention heads cannot be divided by TP size 3")
    table = text.split("\n\n")[1].splitlines()
    assert table[1].split() == ["(MB)", "(GiB/GPU)", "(MB)", "(ms)"]
    assert max(map(len, table)) <= 160


def test_notes_of_a_model_are_told_before_it_runs() -> None:
    wide = [
        "--num-layers=2",
        "--hidden-size=64",
        "--num-attention-heads=4",
        "--num-experts=32",
        "--disable-bias-linear",
    ]
    text = sweep_text(planned_lines(["1:1:1:1:collocated:gloo:a", "1:2:1:1:collocated:gloo:b"], 2, *wide))
    assert text.count("Note (all): without --moe-ffn-hidden-size each of 32 experts") == 1


def test_the_largest_list_reads_well_in_160_columns() -> None:
    text = sweep_text(
        plan(select_file("kimi_k2", ["--model", "tiny", "--num-attention-heads=32"]), Allocation(128, 8, None)), 160
    )
    names = [line.split()[0] for line in text.splitlines() if line.startswith("TP")]
    assert names[3] == "TP16_EP4_to_TP32_EP2_64to64"


@pytest.mark.parametrize(
    ("given", "added", "note"),
    [
        (["--refit-method", "nvshmem"], ["--refit-method=shm"], "--refit-method shm stands in for nvshmem"),
        (["--refit-method=nccl", "--swiglu"], ["--refit-method=gloo"], "gloo stands in for nccl"),
        (["--refit-method", "nccl", "--data-path", "a", "b"], ["--refit-method=gloo"], "gloo stands in for nccl"),
        (["--refit-method=nccl", "--refit-method=shm"], [], ""),
        (["--refit-method", "gloo"], [], ""),
        (["--app-tag-run-name", "nccl"], [], ""),
    ],
)
def test_what_stands_in_on_cpus(given: list[str], added: list[str], note: str) -> None:
    """Of a flag given twice the last one counts, so the stand-in is added at the end."""
    words, found = on_cpus(given)
    assert words == [*given, *added]
    assert (note in found) if note else (found == "")
    if added:
        assert on_cpus(words) == (words, "")


KIMI_K2 = (
    "--model=kimi_k2",
    "--refit-method=shm",
    "--tensor-model-parallel-size=8",
    "--expert-model-parallel-size=8",
    "--rl-inference-expert-model-parallel-size=4",
)
"""The scenario of the README, 96 ranks, with its stand-in on CPUs."""

GB = 10**9
LAPTOP = Machine(cores=2, memory_bytes=16 * GB)
SERVER = Machine(cores=192, memory_bytes=6000 * GB)


@pytest.mark.parametrize(
    ("flags", "machine", "problems"),
    [
        (KIMI_K2, LAPTOP, ["96 ranks > 64 for 2 cores", "GB of memory > 16.00 GB free", "hours > 1"]),
        (KIMI_K2, Machine(192, 500 * GB), ["GB of memory > 500.00 GB free"]),
        (KIMI_K2, Machine(16, 6000 * GB), ["hours > 1"]),
        ((*TINY, "--source-world-size=65"), Machine(8, 6000 * GB), ["66 ranks > 64 for 8 cores"]),
        ((*TINY, "--source-world-size=31"), Machine(2, 10 * GB), ["GB of memory > 10.00 GB free"]),
        ((*TINY, "--num-benchmark-iterations=1000000"), LAPTOP, ["hours > 1"]),
    ],
)
def test_what_cpus_cannot_run_is_refused_with_both_numbers(
    flags: tuple[str, ...], machine: Machine, problems: list[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        checked(flags, DryRunOptions(None, 8, None), machine)
    start, _, rest = str(refused.value).partition(" need too much: ")
    found, _, remedy = rest.partition(": ")
    assert start == "ranks on the CPUs of this machine"
    assert len(re.findall(r" > ", found)) == len(problems)
    assert all(problem in found for problem in problems)
    assert remedy == "plan it with --dry-run, or run --model tiny on few ranks"
    planned = check(Candidate("a", flags), DryRunOptions(None, 8, None), machine)
    assert (planned.status, planned.reason) == (Status.REFUSED, str(refused.value))
    assert check(Candidate("a", flags), DryRunOptions(None, 8, None)).status is Status.READY


@pytest.mark.parametrize(
    ("flags", "machine"),
    [
        ((*TINY, *TP2_EP2), LAPTOP),
        ((*TINY, "--source-world-size=65"), Machine(9, 6000 * GB)),
        ((*TINY, *TP2_EP2), Machine(2, None)),
        (KIMI_K2, SERVER),
    ],
)
def test_what_cpus_can_run_is_ready(flags: tuple[str, ...], machine: Machine) -> None:
    assert check(Candidate("a", flags), DryRunOptions(None, 8, None), machine).status is Status.READY


def test_a_model_provider_on_cpus_is_judged_by_its_ranks() -> None:
    flags = ("--model-provider=examples.custom_model:build", "--refit-method=gloo", *TP2_EP2)
    assert check(Candidate("a", flags), DryRunOptions(None, 8, None), LAPTOP).status is Status.READY
    small = check(Candidate("a", flags), DryRunOptions(None, 8, None), Machine(2, GB))
    assert "2.40 GB of memory > 1.00 GB free" in (small.reason or "")


def test_a_sweep_on_cpus_refuses_what_is_too_large_for_them() -> None:
    lines = ["1:1:1:1:non-collocated:gloo:small", "8:8:8:4:non-collocated:gloo:large"]
    sweep = plan(select_lines(lines, ["--model=kimi_k2", "--num-layers=4"]), Allocation(128, 8, None, LAPTOP))
    assert {planned.status for planned in sweep.scenarios} == {Status.REFUSED}
    sweep = plan(select_lines(lines[:1], ["--model=tiny"]), Allocation(128, 8, None, LAPTOP))
    assert sweep.scenarios[0].status is Status.READY
