"""Reads the clusters of `configs/clusters` and finds the one that a run is on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from refit.config import yaml_files
from refit.config.limits import MAX_COUNT
from refit.errors import UsageError

MAX_NUMBER = 1e6
"""Most GB, GB/s or TFLOP/s in a cluster's file, and the inverse of the least."""

LINKS = ("intra_node_gb_per_s", "inter_node_gb_per_s", "gpus_per_node", "copy_gb_per_s")
GPU = ("gpu_memory_gb", "memory_gb_per_s", "bf16_tflops", "fp8_tflops")
NUMBERS = (*LINKS, *GPU)
REQUIRED = ("intra_node_gb_per_s", "gpus_per_node")
TEXTS = ("gpu", "source", "measured")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Memory, link speeds and arithmetic of a cluster. Speeds are one GPU's in one direction.

    A node is an NVLink domain: the GPUs that reach each other at `intra_bytes_per_s` (8 in an HGX host, 72 in an NVL72
    rack). What is None leaves out what needs it.
    """

    name: str
    intra_bytes_per_s: float
    inter_bytes_per_s: float | None
    """Between nodes; None where only one node is described."""
    gpus_per_node: int
    """Those of an NVLink domain."""
    copy_bytes_per_s: float | None
    """Counts bytes copied within a GPU once, not as read and write; None leaves local copies out of the bound."""
    gpu_memory_bytes: int | None
    gpu: str | None
    """The end of the device's name, by which a run finds its cluster; None where users must name it."""
    source: str
    """Where the figures come from."""
    measured: str | None = None
    """The day on which `refit calibrate` took them; None of a file that it has not written."""
    memory_bytes_per_s: float | None = None
    """What a GPU reads of its memory."""
    bf16_flops_per_s: float | None = None
    """What its products of dense matrices in BF16 reach."""
    fp8_flops_per_s: float | None = None
    """The same in FP8."""

    def check_serves(self, dtypes: Iterable[str]) -> None:
        """Raise UsageError, naming the keys, where it lacks what bounds of serving need. `dtypes` are those that matrix
        products are in, `bf16` and `fp8`."""
        found = {"bf16": self.bf16_flops_per_s, "fp8": self.fp8_flops_per_s}
        missing = ["memory_gb_per_s"] if self.memory_bytes_per_s is None else []
        missing += [f"{dtype}_tflops" for dtype in dtypes if found[dtype] is None]
        if missing:
            raise UsageError(
                f"cluster {self.name} has no {' and no '.join(missing)}, which bounds of serving need: add "
                f"{'them' if len(missing) > 1 else 'it'} to its file, or give --objective refit"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """The cluster a run is on. Where none could be chosen, `remedy` says which flag to give."""

    cluster: Cluster | None
    remedy: str = ""


def load_cluster(name: str) -> Cluster:
    """A file of `configs/clusters`, or the YAML file at path `name`.

    `intra_node_gb_per_s` and `gpus_per_node` must be there, all others may be left out. Speeds are GB/s of one GPU in
    one direction, `memory_gb_per_s` those of reading its memory, `bf16_tflops` and `fp8_tflops` of dense matrices.
    Raises UsageError, naming file and key, for an unknown name or key, a number that is not positive, finite and
    within its limit, or a text that is none.
    """
    path = yaml_files.find("clusters", name)
    values = yaml_files.read_mapping(path)
    unknown = sorted(values.keys() - {*NUMBERS, *TEXTS})
    if unknown:
        raise UsageError(
            f"{path}: unknown key {yaml_files.shortened(unknown[0])[1:-1]}: {', '.join((*NUMBERS, *TEXTS))} are known"
        )
    numbers = {key: _number(path, key, values.get(key)) for key in NUMBERS}
    intra, gpus_per_node = numbers["intra_node_gb_per_s"], numbers["gpus_per_node"]
    assert intra is not None
    assert gpus_per_node is not None
    if gpus_per_node != int(gpus_per_node):
        raise UsageError(f"{path}: gpus_per_node must be a whole number, not {gpus_per_node!r}")
    texts = {key: _text(path, key, values.get(key)) for key in TEXTS}
    return Cluster(
        name=path.stem,
        intra_bytes_per_s=intra * 1e9,
        inter_bytes_per_s=_scaled(numbers["inter_node_gb_per_s"]),
        gpus_per_node=int(gpus_per_node),
        copy_bytes_per_s=_scaled(numbers["copy_gb_per_s"]),
        gpu_memory_bytes=int(numbers["gpu_memory_gb"] * 1e9) if numbers["gpu_memory_gb"] else None,
        gpu=texts["gpu"] or None,
        source=texts["source"],
        measured=texts["measured"] or None,
        memory_bytes_per_s=_scaled(numbers["memory_gb_per_s"]),
        bf16_flops_per_s=_scaled(numbers["bf16_tflops"], 1e12),
        fp8_flops_per_s=_scaled(numbers["fp8_tflops"], 1e12),
    )


def check_hosts_of(cluster: Cluster, ranks_per_host: int, num_hosts: int) -> None:
    """Raise UsageError where a cluster that was measured has other hosts than a run.

    Ranks of a host share its links, so that a rank's share of them holds for equally many.
    """
    measured, here = cluster.gpus_per_node, ranks_per_host
    if cluster.measured is not None and (here != measured if num_hosts > 1 else here > measured):
        raise UsageError(
            f"--cluster {cluster.name} was measured with {measured} ranks on a host, this run has {here}: start "
            f"{measured} on each, or run refit calibrate with {here}"
        )


def clusters_of(device_name: str) -> list[Cluster]:
    """The clusters of `configs/clusters` whose `gpu` is the end of `device_name`, in whole words.

    `H200` is an `NVIDIA H200`, but neither an `NVIDIA H200 NVL` nor an `NVIDIA GH200`.
    """
    known = (load_cluster(name) for name in yaml_files.names("clusters"))
    return [cluster for cluster in known if cluster.gpu and f" {device_name}".endswith(f" {cluster.gpu}")]


def choose_cluster(device_name: str, num_ranks: int, num_hosts: int) -> Choice:
    """The cluster of a run on one host, where exactly one has its GPU. A network between hosts is never guessed."""
    fitting = [cluster for cluster in clusters_of(device_name) if num_ranks <= cluster.gpus_per_node]
    if num_hosts == 1 and len(fitting) == 1:
        return Choice(fitting[0])
    if num_hosts > 1:
        return Choice(None, f"give --cluster, the network between {num_hosts} hosts cannot be told from {device_name}")
    if not fitting:
        return Choice(None, f"give --cluster FILE.yaml, none of configs/clusters describes {device_name}")
    return Choice(None, f"give --cluster, {' or '.join(cluster.name for cluster in fitting)} fit this GPU")


def _number(path: Path, key: str, value: object) -> float | None:
    if value is None and key not in REQUIRED:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{path}: {key} must be a positive number, not {yaml_files.shortened(value)}")
    least, most = (1, MAX_COUNT) if key == "gpus_per_node" else (1 / MAX_NUMBER, MAX_NUMBER)
    if not least <= value <= most:
        raise UsageError(f"{path}: {key} must be from {least:g} to {most:,.0f}, not {value}")
    return float(value)


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str | None):
        raise UsageError(f"{path}: {key} must be text, not {yaml_files.shortened(value)}")
    return value or ""


def _scaled(number: float | None, scale: float = 1e9) -> float | None:
    return None if number is None else number * scale
