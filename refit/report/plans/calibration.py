"""What `refit calibrate` measured, as a table and as a file for `--cluster`."""

from __future__ import annotations

import json

from refit.report.terminal.console import table_width
from refit.report.terminal.grid import Column, fitted
from refit.results.calibration import Calibration, Link, Speed

COLUMNS = (
    Column("link", is_text=True),
    Column("ranks", is_text=True),
    Column("method", is_text=True),
    Column("bytes"),
    Column("median", "(ms)"),
    Column("min-max", "(ms)"),
    Column("a rank", "(GB/s)"),
)


def calibration_text(found: Calibration) -> str:
    """A row for each measurement, and what a rank reads and computes."""
    rows = [[*_words(each), *_figures(each)] for each in found.speeds]
    own = [f"a rank {what}" for what in _own(found).values()]
    return "\n".join([fitted(COLUMNS, rows, table_width()), *([f"While all do, {', '.join(own)}"] if own else [])])


def _own(found: Calibration) -> dict[str, str]:
    """Key of a cluster's file -> what it is, with its figure."""
    texts = {}
    if found.read_bytes_per_s is not None:
        texts["memory_gb_per_s"] = f"reads {found.read_bytes_per_s / 1e9:.4g} GB/s of its memory"
    if found.bf16_flops_per_s is not None:
        texts["bf16_tflops"] = f"multiplies at {found.bf16_flops_per_s / 1e12:.4g} TFLOP/s in BF16"
    return texts


def cluster_text(found: Calibration) -> str:
    """The file, with all figures as comments. Speeds are those of a rank while all send."""
    within, between, copied = (found.of(link) for link in (Link.WITHIN, Link.BETWEEN, Link.COPY))
    methods = {each.link: each.method for each in found.speeds}
    ways = ", ".join(f"{link.value} by {method}" for link, method in methods.items() if link is not Link.COPY)
    source = (
        f"measured by refit calibrate on {found.date}, {found.num_hosts} hosts of {found.ranks_per_host} ranks "
        f"({found.machine}), {ways}, all ranks at once, medians of {found.num_times}, commit "
        f"{found.commit or 'unknown'}"
    )
    speeds = {"intra_node_gb_per_s": within or copied, "inter_node_gb_per_s": between, "copy_gb_per_s": copied}
    own = {
        "memory_gb_per_s": (found.read_bytes_per_s or 0.0) / 1e9,
        "bf16_tflops": (found.bf16_flops_per_s or 0.0) / 1e12,
    }
    return "\n".join(
        [
            "# GB/s of a rank in one direction. With one rank on a host, intra_node_gb_per_s is that of its copies.",
            *(f"# {' '.join(_words(each))}, {_mib(each.nbytes)}: {_gb_per_s(each)} GB/s" for each in found.speeds),
            *(f"{key}: {speed / 1e9:.6g}" for key, speed in speeds.items() if speed is not None),
            *(f"{key}: {speed:.6g}" for key, speed in own.items() if speed),
            f"gpus_per_node: {found.ranks_per_host}",
            f"source: {json.dumps(source)}",
            f'measured: "{found.date}"',
        ]
    )


def _words(speed: Speed) -> tuple[str, str, str]:
    return speed.link.value, speed.pattern.value, speed.method


def _figures(speed: Speed) -> tuple[str, ...]:
    return (
        _mib(speed.nbytes),
        f"{1e3 * speed.seconds:,.3f}",
        f"{1e3 * speed.least_s:,.3f}-{1e3 * speed.most_s:,.3f}",
        _gb_per_s(speed),
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:g} MiB"


def _gb_per_s(speed: Speed) -> str:
    return f"{speed.bytes_per_s / 1e9:.4g}"
