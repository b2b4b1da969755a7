"""A result as a run of TP2 EP2 -> TP2 EP1 on eight GPUs leaves it, with times to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refit.results.result import EngineResult, Result, Sample
from refit.results.stats import summarise

LAYOUT = {"tp": 2, "ep": 2, "etp": 2, "pp": 1, "first_stage_layers": None, "last_stage_layers": None}


def sample(
    seconds_per_rank: Sequence[float], iteration: int = 0, *, warmup: bool = False, num_wrong: int = 0
) -> Sample:
    slowest = max(range(len(seconds_per_rank)), key=seconds_per_rank.__getitem__)
    return Sample(
        iteration, warmup, list(seconds_per_rank), slowest, {"wire": 0.75 * max(seconds_per_rank)}, 0.0, 100, num_wrong
    )


def engine(measured: Sequence[Sequence[float]], num_warmup: int = 2) -> EngineResult:
    """An engine with one list of seconds per rank for each measured refit."""
    warm = [sample(measured[0], number, warmup=True) for number in range(num_warmup)]
    samples = warm + [sample(seconds, number) for number, seconds in enumerate(measured, num_warmup)]
    summary = summarise([max(seconds) for seconds in measured])
    return EngineResult(
        status="ok",
        cold_s={"plan": 0.125, "prepare": 0.25, "first": 0.5},
        samples=samples,
        summary={name: getattr(summary, name) for name in summary.__slots__},
        bottleneck_gb_per_s=355.8,
        staging_bytes_per_rank=[512 << 20] * 8,
    )


def result(**engines: EngineResult) -> Result:
    scenario: dict[str, Any] = {
        "title": "TP2 EP2 -> TP2 EP1",
        "world_size": 8,
        "mode": "non-collocated",
        "method": "nvshmem",
        "verify": "full",
        "model_name": "kimi_k2",
        "model_provider": None,
        "num_parameters": 1000,
        "num_tensors": 10,
        "dtypes": ["bfloat16"],
    }
    environment = {"versions": {"torch": "2.11.0"}, "host": "node1", "gpus": [{"name": "NVIDIA H200"}] * 8}
    moved = {
        "payload": 30_000_000_000,
        "wire": 30_000_000_000,
        "local": 0,
        "sender_imbalance": 1.0,
        "sent_by_rank": dict.fromkeys(range(4), 7_500_000_000),
        "received_by_rank": {4: 15_000_000_000, 5: 15_000_000_000},
    }
    return Result(
        "run",
        scenario,
        environment,
        layouts={
            "source": {**LAYOUT, "world_size": 4, "first_rank": 0},
            "destination": {**LAYOUT, "ep": 1, "world_size": 2, "first_rank": 4},
        },
        bytes=moved,
        plan={"num_transfers": 12, "digest": "0123456789abcdef", "casts": {}},
        bound={"cluster": "h200_nvlink", "lower_bound_s": 0.0384, "limited_by": "rank 4 receives 15.00 GB ..."},
        engines=engines,
    )
