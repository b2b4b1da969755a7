"""The cluster files, and how a run finds the one it is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.config import clusters, yaml_files
from refit.config.clusters import choose_cluster, clusters_of, load_cluster
from refit.errors import UsageError


def test_clusters_load_and_say_where_their_figures_come_from() -> None:
    names = yaml_files.names("clusters")
    assert {"h200_nvlink", "h100_ib400", "gb200_nvl72", "p5en_efa"} <= set(names)
    for name in names:
        cluster = load_cluster(name)
        assert cluster.intra_bytes_per_s > (cluster.inter_bytes_per_s or 0)
        assert cluster.gpu_memory_bytes
        cluster.check_serves(("bf16", "fp8"))
        assert ("not measured by us" in cluster.source) != ("measured on" in cluster.source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("intra_node_gb_per_s: 0\ngpus_per_node: 8\n", "intra_node_gb_per_s must be a positive number, not 0"),
        ("gpus_per_node: 8\n", "intra_node_gb_per_s must be a positive number, not None"),
        ("intra_node_gb_per_s: 1\n", "gpus_per_node must be a positive number, not None"),
        ("intra_node_gb_per_s: 1\ngpus_per_node: 7.5\n", "gpus_per_node must be a whole number, not 7.5"),
        ("intra_node_gb_per_s: 1\ngpus_per_node: 8\ngpu_memory_gb: much\n", "gpu_memory_gb must be a positive number"),
        ("intra_node_gb_per_s: 1\ngpus_per_node: 8\ncopy_gb_per_s: yes\n", "copy_gb_per_s must be a positive number"),
        ("link_gb_per_s: 1\n", "unknown key link_gb_per_s: intra_node_gb_per_s, inter_node_gb_per_s"),
    ],
)
def test_a_bad_cluster_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_cluster(str(path))


@pytest.mark.parametrize(
    ("device", "names"),
    [
        ("NVIDIA H200", ["h200_nvlink"]),
        ("NVIDIA H200 NVL", []),
        ("NVIDIA GH200 480GB", []),
        ("NVIDIA GB200", ["gb200_nvl72"]),
        ("NVIDIA H100 80GB HBM3", ["h100_efa", "h100_ib400"]),
        ("NVIDIA H100 PCIe", []),
    ],
)
def test_clusters_by_gpu(device: str, names: list[str]) -> None:
    assert [cluster.name for cluster in clusters_of(device)] == names


def test_one_host_with_a_gpu_of_one_cluster_is_on_that_cluster() -> None:
    choice = choose_cluster("NVIDIA H200", num_ranks=8, num_hosts=1)
    assert choice.cluster == load_cluster("h200_nvlink")


@pytest.mark.parametrize(
    ("device", "num_ranks", "num_hosts", "remedy"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 1, "give --cluster, h100_efa or h100_ib400 fit this GPU"),
        ("NVIDIA H200", 16, 2, "give --cluster, the network between 2 hosts cannot be told from NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", 8, 1, "give --cluster FILE.yaml, none of configs/clusters describes NVIDIA A100"),
    ],
)
def test_otherwise_the_user_is_told_what_to_give(device: str, num_ranks: int, num_hosts: int, remedy: str) -> None:
    choice = choose_cluster(device, num_ranks, num_hosts)
    assert choice.cluster is None
    assert choice.remedy.startswith(remedy)


def test_more_ranks_than_a_node_has_gpus_are_not_on_that_node() -> None:
    assert clusters.choose_cluster("NVIDIA H200", 16, 1).cluster is None
