"""Results as tidy tables for programs: CSV and JSON, one row per scenario and engine, or per refit and rank."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from refit.config.side import SideSpec
from refit.report.refits.entries import Entry, entries_of
from refit.report.terminal.grid import comma_separated
from refit.results.refit import Sample
from refit.results.runs import Run
from refit.results.shares import share_rows
from refit.results.stats import Summary

Record = dict[str, object]
"""A row by column names. Times are in ms, sizes in bytes, shares from 0 to 1; none is rounded for reading."""

SIZES = ("tp", "ep", "etp", "pp", "vpp", "world_size")
TIMES = ("median", "p95", "mean", "min", "max")
COLD = ("plan", "prepare", "first")


def records(runs: Iterable[Run]) -> list[Record]:
    """One row per scenario and engine. Every row has the same columns; missing values are None."""
    entries = entries_of(runs)
    versions = dict.fromkeys(name for entry in entries for name in entry.environment.versions)
    return [
        _record(entry) | {f"version_{name}": entry.environment.versions.get(name) for name in versions}
        for entry in entries
    ]


def sample_records(runs: Iterable[Run]) -> list[Record]:
    """One row per refit and rank, warm-up included, of all engines."""
    return [
        row
        for entry in entries_of(runs)
        if entry.engine is not None
        for sample in entry.engine.samples
        for row in _sample_rows(entry, sample)
    ]


def csv_text(rows: Sequence[Record]) -> str:
    """Rows as CSV with a header, without a newline at its end."""
    header = tuple(rows[0]) if rows else ()
    return comma_separated(header, [tuple(row.values()) for row in rows])


def json_text(rows: Sequence[Record]) -> str:
    """Rows as a JSON list of objects, one a line. Other signs than ASCII's are escaped."""
    lines = (json.dumps(row, ensure_ascii=True, allow_nan=False) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]"


def _identity(entry: Entry) -> Record:
    """What names a row: the columns by which tables of rows and of samples are joined."""
    return {
        "directory": str(entry.run.directory),
        "run_id": entry.run.sweep.run_id,
        "scenario": entry.outcome.planned.name,
        "engine": entry.name,
    }


def _record(entry: Entry) -> Record:
    outcome, environment = entry.outcome, entry.environment
    planned, result = outcome.planned, outcome.result
    scenario = result.scenario if result is not None and result.scenario is not None else planned.scenario
    return {
        **_identity(entry),
        "date": result.started if result else None,
        "status": entry.status.value,
        "reason": entry.reason,
        "valid": entry.is_valid,
        "model": entry.model,
        "mode": planned.mode,
        "method": entry.method,
        "encoding": scenario.encoding if scenario is not None else None,
        "source": planned.source.title if planned.source else None,
        "destination": planned.destination.title if planned.destination else None,
        **_sizes("source", planned.source),
        **_sizes("destination", planned.destination),
        "num_ranks": planned.num_ranks,
        "nodes": planned.nodes,
        "device": result.device if result else None,
        "gpu": environment.gpus[0].name if environment.gpus else None,
        "host": environment.host,
        "commit": environment.commit,
        **_measured(entry),
        **_moved(entry),
    }


def _sizes(name: str, side: SideSpec | None) -> Record:
    return {f"{name}_{size}": getattr(side.layout, size) if side else None for size in SIZES}


def _measured(entry: Entry) -> Record:
    """The times and the verdict of an engine."""
    engine = entry.engine
    summary: Summary | None = engine.summary if engine else None
    cold = engine.cold_s if engine else {}
    return {
        **{f"{name}_ms": _ms(getattr(summary, f"{name}_s", None)) for name in TIMES},
        "cv": summary.cv if summary else None,
        "num_refits": len(engine.measured_s) if engine else 0,
        "cold_ms": _ms(engine.cold_total_s) if engine and cold else None,
        **{f"cold_{name}_ms": _ms(cold.get(name)) for name in COLD},
        "connect_ms": _ms(engine.connect_s) if engine else None,
        "engine_pause_ms": _ms(engine.served.pause_s) if engine and engine.served else None,
        "gb_per_s": engine.bottleneck_gb_per_s if engine else None,
        "staging_bytes": max(engine.staging_bytes_per_rank, default=None) if engine else None,
        "extra_memory_bytes": _largest(engine.extra_memory_bytes_per_rank) if engine else None,
        "not_moved_bytes": engine.not_moved_bytes if engine else None,
        **_changes(entry),
        "num_compared": engine.num_compared if engine else None,
        "num_wrong": engine.num_wrong if engine else None,
        "ratio": entry.ratio,
        "ratio_between": entry.ratio_between,
    }


def _changes(entry: Entry) -> Record:
    """What an engine that sends changes sent, of the first share."""
    rows = share_rows(entry.outcome.refit) if entry.is_tested else []
    return {
        "changed_share": rows[0].changed_share if rows else None,
        "sent_bytes": rows[0].sent_bytes if rows else None,
    }


def _moved(entry: Entry) -> Record:
    """The bytes of the plan, its lower bound, and the floor under all plans."""
    cost, bound, plan = entry.outcome.cost, entry.outcome.bound, entry.outcome.refit.plan
    floor, hosts = entry.outcome.refit.floor, entry.outcome.refit.hosts
    return {
        "cluster": bound.cluster if bound else None,
        "lower_bound_ms": _ms(bound.seconds) if bound else None,
        "limited_by": bound.limited_by if bound else None,
        "floor_ms": _ms(floor.seconds) if floor else None,
        "share_of_lower_bound": entry.share_of_bound,
        "payload_bytes": cost.payload_bytes if cost else None,
        "wire_bytes": cost.wire_bytes if cost else None,
        "local_bytes": cost.local_bytes if cost else None,
        "busiest_bytes": cost.busiest.nbytes if cost else None,
        "busiest_rank": cost.busiest.rank if cost and cost.busiest.nbytes else None,
        "num_transfers": plan.num_transfers if plan else None,
        "relay": hosts.relay if hosts else None,
        **{f"{name}_hosts_bytes": getattr(hosts, f"{name}_bytes", None) for name in ("between", "within")},
        **{f"{name}_between_bytes": getattr(hosts, f"{name}_bytes", None) for name in ("direct", "least")},
    }


def _sample_rows(entry: Entry, sample: Sample) -> Iterator[Record]:
    planned = entry.outcome.planned
    for rank, seconds in enumerate(sample.seconds_per_rank):
        yield {
            **_identity(entry),
            "iteration": sample.iteration,
            "warmup": sample.warmup,
            "rank": rank,
            "in_source": planned.source is not None and rank in planned.source.ranks,
            "in_destination": planned.destination is not None and rank in planned.destination.ranks,
            "ms": _ms(seconds),
            "slowest": rank == sample.slowest_rank,
            "iteration_num_wrong": sample.num_wrong,
        }


def _ms(seconds: float | None) -> float | None:
    """Milliseconds, to 12 digits: 45.2 and not 45.199999999999996."""
    return None if seconds is None else float(f"{1e3 * seconds:.12g}")


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
