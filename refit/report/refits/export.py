"""Results as tidy tables for programs: CSV and JSON, one row per scenario and engine, or per refit and rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from refit.plan.cost import Cost
from refit.report.refits.entries import Entry, entries_of
from refit.report.terminal.grid import comma_separated
from refit.results.refit import EngineResult, Sample
from refit.results.runs import Run
from refit.results.shares import ShareRow, share_rows

SIDES = ("source", "destination")
SIZES = {
    "tp": "tensor parallel size",
    "ep": "expert parallel size",
    "etp": "tensor parallel size of experts",
    "pp": "pipeline stages",
    "vpp": "virtual stages on each rank",
    "world_size": "ranks",
}
TIMES = ("median", "p95", "mean", "min", "max")
COLD = {"plan": "planning", "prepare": "preparing", "first": "the first refit"}

Record = dict[str, object]
"""A row by column names. Times are in ms, sizes in bytes, shares from 0 to 1; none is rounded for reading."""

Read = Callable[[Entry], object]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of rows: what it means, and what a row has there. docs/fields.md lists them."""

    name: str
    meaning: str
    read: Read


@dataclass(frozen=True, slots=True)
class SampleColumn:
    """A column of the table of refits and ranks, of a sample and the number of a rank."""

    name: str
    meaning: str
    read: Callable[[Entry, Sample, int], object]


def _engine(read: Callable[[EngineResult], object]) -> Read:
    return lambda entry: read(entry.engine) if entry.engine else None


def _cost(read: Callable[[Cost], object]) -> Read:
    return lambda entry: read(entry.outcome.cost) if entry.outcome.cost else None


def _share(read: Callable[[ShareRow], object]) -> Read:
    def of_first(entry: Entry) -> object:
        rows = share_rows(entry.outcome.refit) if entry.is_tested else []
        return read(rows[0]) if rows else None

    return of_first


def _size(side: str, size: str) -> Read:
    def read(entry: Entry) -> object:
        spec = getattr(entry.outcome.planned, side)
        return getattr(spec.layout, size) if spec else None

    return read


def _layout(side: str) -> Column:
    def title(entry: Entry) -> object:
        spec = getattr(entry.outcome.planned, side)
        return spec.title if spec else None

    return Column(side, "its layout, as text", title)


def _sizes(side: str) -> list[Column]:
    return [Column(f"{side}_{size}", meaning, _size(side, size)) for size, meaning in SIZES.items()]


def _time(name: str) -> Read:
    return _engine(lambda engine: _ms(getattr(engine.summary, f"{name}_s", None)))


def _cold(name: str) -> Read:
    return _engine(lambda engine: _ms(engine.cold_s.get(name)))


def _hosts(name: str) -> Read:
    return lambda entry: getattr(entry.outcome.refit.hosts, name, None)


def _encoding(entry: Entry) -> object:
    planned, result = entry.outcome.planned, entry.outcome.result
    scenario = result.scenario if result is not None and result.scenario is not None else planned.scenario
    return scenario.encoding if scenario is not None else None


IDENTITY = (
    Column("directory", "of the run", lambda entry: str(entry.run.directory)),
    Column("run_id", "of the run", lambda entry: entry.run.sweep.run_id),
    Column("scenario", "its name", lambda entry: entry.outcome.planned.name),
    Column("engine", "`refit`, `megatron`, `nccl-m2n`, `full`; blank where none ran", lambda entry: entry.name),
)
"""What names a row: the columns by which tables of rows and of samples are joined."""

COLUMNS = (
    *IDENTITY,
    Column(
        "date",
        "ISO 8601, UTC",
        lambda entry: entry.outcome.result.started if entry.outcome.result is not None else None,
    ),
    Column(
        "status",
        "ok, wrong_data, failed, waived, refused, skipped, missing; of a baseline its own",
        lambda entry: entry.status.value,
    ),
    Column("reason", "why there is no valid result", lambda entry: entry.reason),
    Column("valid", "there are times, and everything compared was right", lambda entry: entry.is_valid),
    Column("model", "preset or provider", lambda entry: entry.model),
    Column("mode", "collocated or non-collocated", lambda entry: entry.outcome.planned.mode),
    Column("method", "what moved this row's bytes; where nothing ran, what was to", lambda entry: entry.method),
    Column("encoding", "of the scenario", _encoding),
    *(_layout(side) for side in SIDES),
    *(column for side in SIDES for column in _sizes(side)),
    Column("num_ranks", "of both sides", lambda entry: entry.outcome.planned.num_ranks),
    Column("nodes", "that they are on", lambda entry: entry.outcome.planned.nodes),
    Column(
        "device", "where the models were", lambda entry: entry.outcome.result.device if entry.outcome.result else None
    ),
    Column("gpu", "the first", lambda entry: entry.environment.gpus[0].name if entry.environment.gpus else None),
    Column("host", "the first", lambda entry: entry.environment.host),
    Column("commit", "of the suite", lambda entry: entry.environment.commit),
    *(Column(f"{name}_ms", "over the measured refits", _time(name)) for name in TIMES),
    Column("cv", "standard deviation / mean", _engine(lambda engine: engine.summary.cv if engine.summary else None)),
    Column("num_refits", "measured ones", lambda entry: len(entry.engine.measured_s) if entry.engine else 0),
    Column(
        "cold_ms",
        "a cold refit, the sum of the next three",
        _engine(lambda engine: _ms(engine.cold_total_s) if engine.cold_s else None),
    ),
    *(Column(f"cold_{name}_ms", meaning, _cold(name)) for name, meaning in COLD.items()),
    Column("connect_ms", "connections, before a cold refit", _engine(lambda engine: _ms(engine.connect_s))),
    Column(
        "engine_pause_ms",
        "of a running engine: the refit and the phases around it",
        _engine(lambda engine: _ms(engine.served.pause_s) if engine.served else None),
    ),
    Column("gb_per_s", "bottleneck bandwidth", _engine(lambda engine: engine.bottleneck_gb_per_s)),
    Column(
        "staging_bytes",
        "of the rank with most",
        _engine(lambda engine: max(engine.staging_bytes_per_rank, default=None)),
    ),
    Column(
        "extra_memory_bytes",
        "of the rank with most",
        _engine(lambda engine: _largest(engine.extra_memory_bytes_per_rank)),
    ),
    Column("not_moved_bytes", "what the engine left out", _engine(lambda engine: engine.not_moved_bytes)),
    Column(
        "changed_share",
        "what had changed, mean of the measured refits of the first share; blank where weights are sent as they are",
        _share(lambda row: row.changed_share),
    ),
    Column("sent_bytes", "what all ranks sent, likewise", _share(lambda row: row.sent_bytes)),
    Column("num_compared", "elements, over all refits", _engine(lambda engine: engine.num_compared)),
    Column("num_wrong", "elements, over all refits", _engine(lambda engine: engine.num_wrong)),
    Column(
        "ratio",
        "of a baseline: its median / that of `refit`; blank where either does not count",
        lambda entry: entry.ratio,
    ),
    Column(
        "ratio_between",
        "`shm against gloo`: what moved the bytes of `refit` and of the baseline, where these differ",
        lambda entry: entry.ratio_between,
    ),
    Column("cluster", "whose speeds the bound has", lambda entry: getattr(entry.outcome.bound, "cluster", None)),
    Column("lower_bound_ms", "of the plan", lambda entry: _ms(getattr(entry.outcome.bound, "seconds", None))),
    Column("limited_by", "what sets the bound", lambda entry: getattr(entry.outcome.bound, "limited_by", None)),
    Column(
        "floor_ms",
        "the least bound of all plans",
        lambda entry: _ms(getattr(entry.outcome.refit.floor, "seconds", None)),
    ),
    Column("share_of_lower_bound", "lower bound / median", lambda entry: entry.share_of_bound),
    Column("payload_bytes", "all that the destination needs", _cost(lambda cost: cost.payload_bytes)),
    Column("wire_bytes", "those that leave a rank", _cost(lambda cost: cost.wire_bytes)),
    Column("local_bytes", "those copied within one", _cost(lambda cost: cost.local_bytes)),
    Column("busiest_bytes", "most wire bytes of a rank in one direction", _cost(lambda cost: cost.busiest.nbytes)),
    Column("busiest_rank", "that rank", _cost(lambda cost: cost.busiest.rank if cost.busiest.nbytes else None)),
    Column("num_transfers", "of the plan", lambda entry: getattr(entry.outcome.refit.plan, "num_transfers", None)),
    Column("relay", "off, node or engine; blank, as the next four, on one host", _hosts("relay")),
    Column("between_hosts_bytes", "what crosses between hosts", _hosts("between_bytes")),
    Column("within_hosts_bytes", "what moves within hosts", _hosts("within_bytes")),
    Column("direct_between_bytes", "what would cross without a relay", _hosts("direct_bytes")),
    Column("least_between_bytes", "what crosses in every plan", _hosts("least_bytes")),
)
"""In this order, before a column `version_NAME` for each version in the result files."""

SAMPLE_COLUMNS = (
    SampleColumn("iteration", "which refit", lambda entry, sample, rank: sample.iteration),
    SampleColumn("warmup", "whether it came before the measured ones", lambda entry, sample, rank: sample.warmup),
    SampleColumn("rank", "of the job", lambda entry, sample, rank: rank),
    SampleColumn(
        "in_source", "whether it has a part of the source", lambda entry, _, rank: _has(entry, "source", rank)
    ),
    SampleColumn(
        "in_destination",
        "whether it has a part of the destination",
        lambda entry, _, rank: _has(entry, "destination", rank),
    ),
    SampleColumn("ms", "its time", lambda entry, sample, rank: _ms(sample.seconds_per_rank[rank])),
    SampleColumn(
        "slowest", "whether it sets the refit's time", lambda entry, sample, rank: rank == sample.slowest_rank
    ),
    SampleColumn("iteration_num_wrong", "elements, on all ranks", lambda entry, sample, rank: sample.num_wrong),
)
"""Behind IDENTITY."""


def records(runs: Iterable[Run]) -> list[Record]:
    """One row per scenario and engine. Every row has the same columns; missing values are None."""
    entries = entries_of(runs)
    versions = dict.fromkeys(name for entry in entries for name in entry.environment.versions)
    return [
        _row(entry, COLUMNS) | {f"version_{name}": entry.environment.versions.get(name) for name in versions}
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


def _row(entry: Entry, columns: Sequence[Column]) -> Record:
    return {column.name: column.read(entry) for column in columns}


def _sample_rows(entry: Entry, sample: Sample) -> Iterator[Record]:
    identity = _row(entry, IDENTITY)
    for rank in range(len(sample.seconds_per_rank)):
        yield identity | {column.name: column.read(entry, sample, rank) for column in SAMPLE_COLUMNS}


def _has(entry: Entry, side: str, rank: int) -> bool:
    spec = getattr(entry.outcome.planned, side)
    return spec is not None and rank in spec.ranks


def _ms(seconds: float | None) -> float | None:
    """Milliseconds, to 12 digits: 45.2 and not 45.199999999999996."""
    return None if seconds is None else float(f"{1e3 * seconds:.12g}")


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
