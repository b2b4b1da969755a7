"""Results and sweeps with figures of choice, in the form of the files that runs leave."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refit.results.sweep import Planned, PlannedBytes, Side, Status, Sweep, sweep_file

MODEL = {"num_layers": 61, "hidden_size": 7168}
MANIFEST = {
    "command": "benchmark_refit.py --model tiny",
    "versions": {"python": "3.12.3", "torch": "2.11.0", "megatron-core": "0.19.2"},
    "host": "node001",
    "gpus": [{"name": "NVIDIA H100 80GB HBM3"}] * 8,
    "variables": {"NCCL_NVLS_ENABLE": "0", "SLURM_JOB_ID": "9876543"},
}


def side(tp: int, ep: int, etp: int | None = None, pp: int = 1) -> Side:
    return Side(tp, ep, etp or tp, pp, tp * ep * pp)


def planned(
    name: str,
    source: Side | None = None,
    destination: Side | None = None,
    mode: str = "non-collocated",
    method: str = "nvshmem",
    **changes: Any,
) -> Planned:
    source, destination = source or side(8, 8), destination or side(8, 4)
    sizes = (source.world_size, destination.world_size)
    num_ranks = sum(sizes) if mode == "non-collocated" else max(sizes)
    values = {
        "flags": ("--model", "tiny"),
        "num_ranks": num_ranks,
        "nodes": -(-num_ranks // 8),
        "ranks_per_node": min(8, num_ranks),
        "status": Status.READY,
        "bytes": PlannedBytes(2_000_000_000, 2_000_000_000, 0, 65_930_000_000, 64, "receives"),
    }
    return Planned(name=name, source=source, destination=destination, mode=mode, method=method, **(values | changes))


def engine(samples_s: Sequence[float], *, num_wrong: int = 0, gb_per_s: float | None = 48.1) -> dict[str, Any]:
    """An engine with one warm-up refit twice as long as the first measured one."""
    times = [(True, 2 * samples_s[0]), *((False, seconds) for seconds in samples_s)]
    return {
        "status": "wrong_data" if num_wrong else "ok",
        "reason": None,
        "samples": [
            {
                "warmup": warmup,
                "seconds_per_rank": [seconds / 2, seconds],
                "num_compared": 1_000_000,
                "num_wrong": num_wrong,
            }
            for warmup, seconds in times
        ],
        "summary": {
            "mean_s": statistics.fmean(samples_s),
            "min_s": min(samples_s),
            "max_s": max(samples_s),
            "median_s": statistics.median(samples_s),
        },
        "bottleneck_gb_per_s": gb_per_s,
        "forward": None,
    }


def result(
    entry: Planned,
    samples_s: Sequence[float] = (0.0449, 0.0452, 0.0456),
    *,
    payload: int = 2_051_970_000_000,
    local: int = 0,
    busiest: int = 65_930_000_000,
    num_transfers: int = 38_000,
    bound_s: float | None = None,
    peer: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The result file of a scenario that went well, or `changes` of its top level; sent and received bytes are
    uneven."""
    assert entry.source is not None
    assert entry.destination is not None
    first = entry.source.world_size if entry.mode == "non-collocated" else 0
    received = {str(first + rank): busiest // (1 + rank % 2) for rank in range(entry.destination.world_size)}
    sent = {str(rank): busiest // (2 + rank % 2) for rank in range(entry.source.world_size)}
    layouts = {"source": (entry.source, 0), "destination": (entry.destination, first)}
    return {
        "schema_version": 2,
        "run_id": entry.name,
        "status": "ok",
        "exit_code": 0,
        "failure": None,
        "started": "2026-01-26T15:30:00+00:00",
        "environment": MANIFEST,
        "scenario": {
            "title": f"TP{entry.source.tp} EP{entry.source.ep} -> TP{entry.destination.tp} EP{entry.destination.ep}",
            "mode": entry.mode,
            "method": entry.method,
            "model_name": "kimi_k2",
            "model": MODEL,
            "num_parameters": 1_026_000_000_000,
            "verify": "full",
        },
        "layouts": {
            name: {
                **{axis: getattr(layout, axis) for axis in ("tp", "ep", "etp", "pp", "world_size")},
                "first_rank": start,
            }
            for name, (layout, start) in layouts.items()
        },
        "bytes": {
            "payload": payload,
            "wire": payload - local,
            "local": local,
            "busiest": busiest,
            "sent_by_rank": sent,
            "received_by_rank": received,
        },
        "plan": {"num_transfers": num_transfers, "digest": None},
        "bound": bound_s
        and {"cluster": "h100_ib400", "lower_bound_s": bound_s, "limited_by": "rank 64 receives 65.93 GB at 50 GB/s"},
        "engines": {"refit": engine(samples_s), **({"megatron": peer} if peer else {})},
        **changes,
    }


def sweep_of(entries: Sequence[Planned], run_id: str = "20260126-153000_9876543") -> Sweep:
    return Sweep(run_id, "Kimi K2", "2026-01-26 15:30:00", ("9876543",), 16, 128, 8, "h100_ib400", tuple(entries))


def write_run(directory: Path, sweep: Sweep, results: dict[str, dict[str, Any] | None]) -> Path:
    """The sweep file, and for each named scenario a log and, unless None, a result. Returns the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    sweep.write(sweep_file(directory, sweep.run_id))
    for name, content in results.items():
        stem = f"{sweep.run_id}_{name}"
        (directory / f"{stem}.log").write_text("a line\n")
        if content is not None:
            (directory / f"{stem}.json").write_text(json.dumps(content))
    return directory
