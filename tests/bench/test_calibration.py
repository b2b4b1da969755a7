"""`refit calibrate`: what is measured between ranks, the file of it, and what runs make of that."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from refit.bench import calibration
from refit.commands import main
from refit.config.clusters import check_hosts_of, load_cluster
from refit.errors import ExitCode, UsageError
from refit.plan.cost import Bound
from refit.report.plans.calibration import calibration_text, cluster_text
from refit.report.refits.refit_lines import calibrated_lines
from refit.results.calibration import Calibration, Link, Pattern, Speed
from refit.transport.ranks import Ranks
from tests.ranks.hosts import hosts_of
from tests.ranks.pool import RankError, RankPool
from tests.report.factories import planned, result, timed

NBYTES = 1 << 18
FOUND = Calibration(
    speeds=(
        Speed(Link.BETWEEN, Pattern.PAIR, "gloo", 1 << 20, 0.008, 0.007, 0.009),
        Speed(Link.BETWEEN, Pattern.ALL, "gloo", 64 << 20, 2.0, 1.9, 2.1),
        Speed(Link.WITHIN, Pattern.ALL, "shm", 64 << 20, 0.032, 0.03, 0.04),
        Speed(Link.COPY, Pattern.ALL, "shm", 64 << 20, 0.016, 0.01, 0.02),
    ),
    num_hosts=2,
    ranks_per_host=4,
    num_times=5,
    date="2026-11-30",
    machine='An "old" CPU: 2 cores',
    commit="abc1234",
    read_bytes_per_s=5.8e9,
    bf16_flops_per_s=0.08e12,
)


def measured(rank: int, per_host: int, methods: tuple[str, str] = ("shm", "gloo")) -> Any:
    with hosts_of(rank, per_host):
        ranks = Ranks.of_default_group()
        return calibration.measure(ranks, torch.device("cpu"), *methods, NBYTES, 1, 60.0)


def test_every_link_is_measured_in_every_way(ranks: RankPool) -> None:
    answers = ranks.run(measured, 4)
    assert answers == [answers[0]] * 8
    found = answers[0]
    assert (found.num_hosts, found.ranks_per_host) == (2, 4)
    kinds = {(each.link, each.pattern, each.method, each.nbytes) for each in found.speeds}
    assert len(kinds) == len(found.speeds)
    for link, method in ((Link.BETWEEN, "gloo"), (Link.WITHIN, "shm")):
        assert {(link, pattern, method, NBYTES) for pattern in Pattern} <= kinds
        assert (link, Pattern.PAIR, method, 1 << 16) in kinds
    assert (Link.COPY, Pattern.ALL, "shm", NBYTES) in kinds
    assert all(0 < each.least_s <= each.seconds <= each.most_s for each in found.speeds)
    assert 0 < found.read_bytes_per_s < 1e13
    assert 0 < found.bf16_flops_per_s < 1e15


def test_a_file_has_what_bounds_of_serving_need(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    path.write_text(cluster_text(FOUND))
    cluster = load_cluster(str(path))
    assert (cluster.memory_bytes_per_s, cluster.bf16_flops_per_s) == (5.8e9, 0.08e12)
    cluster.check_serves(("bf16",))
    path.write_text(cluster_text(replace(FOUND, read_bytes_per_s=None)))
    with pytest.raises(UsageError, match="has no memory_gb_per_s and no fp8_tflops"):
        load_cluster(str(path)).check_serves(("bf16", "fp8"))
    assert "a rank reads 5.8 GB/s of its memory" in calibration_text(FOUND)


def test_ranks_alone_on_their_hosts_have_links_between_only(ranks: RankPool) -> None:
    found = ranks.run(measured, 1)[0]
    assert {each.link for each in found.speeds} == {Link.BETWEEN, Link.COPY}
    assert "intra_node_gb_per_s" in cluster_text(found)


def wrong(rank: int) -> Any:
    with mock.patch.object(calibration, "_value", side_effect=lambda key: rank):
        return measured(rank, 4, ("gloo", "gloo"))


def test_bytes_that_arrive_wrong_are_found(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="gloo delivered wrong bytes from rank 0 to 4"):
        ranks.run(wrong)


def test_hosts_that_are_not_full_are_refused_with_both_numbers(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="8 ranks do not fill 3 hosts of 3: start 3 on each"):
        ranks.run(measured, 3)


def test_the_file_is_one_for_cluster(tmp_path: Path) -> None:
    path = tmp_path / "two_hosts.yaml"
    path.write_text(cluster_text(FOUND) + "\n")
    cluster = load_cluster(str(path))
    assert cluster.inter_bytes_per_s == pytest.approx((64 << 20) / 2.0, rel=1e-5), "all ranks at once, not one pair"
    assert cluster.intra_bytes_per_s == pytest.approx((64 << 20) / 0.032, rel=1e-5)
    assert cluster.copy_bytes_per_s == pytest.approx((64 << 20) / 0.016, rel=1e-5)
    assert (cluster.gpus_per_node, cluster.measured, cluster.gpu) == (4, "2026-11-30", None)
    assert "2026-11-30, 2 hosts of 4 ranks" in cluster.source
    assert 'An "old" CPU: 2 cores' in cluster.source
    assert "# between hosts one pair gloo, 1 MiB: 0.1311 GB/s" in path.read_text()
    assert "between hosts  one pair" in calibration_text(FOUND)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--output {0}/x.yaml", "no ranks have no links, 2 are needed: give --nproc-per-node 2 or more"),
        ("--output {0}/x.yaml --nproc-per-node 1", "1 ranks have no links, 2 are needed"),
        ("--output {0}/x.yaml --between shm", "--between shm needs all ranks on one host: use gloo"),
        ("--output {0}/x.yaml --within nccl", "--within nccl moves nothing on cpu: give --device cuda"),
        ("--output {0}", "--output {0} exists: give another name"),
        ("--output {0}/none/x.yaml", "--output {0}/none/x.yaml: there is no folder {0}/none"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    line: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["calibrate", *line.format(tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {reason.format(tmp_path)}")
    assert error.count("\n") == 1


def test_the_command_starts_ranks_and_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    assert main(["calibrate", "--nproc-per-node", "2", "--mib", "1", "--times", "1", "--output", str(path)]) == 0
    cluster = load_cluster(str(path))
    assert (cluster.gpus_per_node, cluster.inter_bytes_per_s) == (2, None)


def test_ranks_that_fail_are_heard_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks are on host a, and one on host b."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nrank = os.environ.get('RANK', '0')\nos.environ['REFIT_HOST'] = 'a' if rank < '2' else 'b'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    path = tmp_path / "here.yaml"
    assert (
        main(["calibrate", "--nproc-per-node", "3", "--mib", "1", "--times", "1", "--output", str(path)])
        == ExitCode.FAILED
    )
    error = capsys.readouterr().err
    assert error.count("error: refit calibrate: 3 ranks do not fill 2 hosts of 2: start 2 on each") == 1
    assert "Traceback" not in error
    assert not path.exists()


def test_a_cluster_of_other_hosts_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "two_hosts.yaml"
    path.write_text(cluster_text(FOUND) + "\n")
    cluster = load_cluster(str(path))
    check_hosts_of(cluster, 4, 2)
    check_hosts_of(cluster, 2, 1)
    for here, num_hosts in ((2, 2), (8, 2), (8, 1)):
        with pytest.raises(UsageError, match=f"was measured with 4 ranks on a host, this run has {here}: start 4 on "):
            check_hosts_of(cluster, here, num_hosts)
    check_hosts_of(replace(cluster, measured=None), 8, 2)


def test_a_run_says_how_far_its_bound_was(tmp_path: Path) -> None:
    path = tmp_path / "two_hosts.yaml"
    path.write_text(cluster_text(FOUND) + "\n")
    run = result(planned("A"), engines={"refit": timed((0.0868, 0.0868, 0.0868))})
    scenario = run.scenario
    assert scenario is not None
    refit = replace(run.refit, bound=Bound("two_hosts", 0.0434, "rank 0 sends"))
    assert calibrated_lines(refit, scenario) == []
    assert calibrated_lines(refit, replace(scenario, cluster=load_cluster(str(path)))) == [
        "Links as measured on 2026-11-30 (two_hosts): the median of 86.8 ms is 2.00 x the lower bound of 43.4 ms"
    ]
