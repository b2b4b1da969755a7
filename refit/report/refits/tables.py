"""The table of a run for people, with a row per scenario and engine: the columns of Markdown, HTML and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refit.config.side import SideSpec
from refit.report.refits.entries import Entry
from refit.report.refits.headline import marked_ms, title
from refit.results.outcomes import are_on_cpus
from refit.results.refit import EngineResult
from refit.results.runs import Run
from refit.results.sweep import Sweep


@dataclass(frozen=True, slots=True)
class Shown:
    """A column. `cell` gives an entry's text, as it is in the files: who renders it has to neutralise it.

    A column that `may_lack` is left out where no entry has text in it.
    """

    title: str
    cell: Callable[[Entry], str]
    is_text: bool = False
    may_lack: bool = False


def shown(entries: Sequence[Entry]) -> list[Shown]:
    """The columns of a table of these entries."""
    return [column for column in COLUMNS if not column.may_lack or any(map(column.cell, entries))]


def run_title(sweep: Sweep) -> str:
    """`Kimi K2 Refit Benchmark (RUN_ID)`."""
    return f"{f'{sweep.title} Refit Benchmark'.strip()} ({sweep.run_id})"


def where_text(run: Run) -> str:
    """`16 nodes, 128 GPUs, DATE`; `1 node, 8 ranks on CPUs, DATE`."""
    sweep = run.sweep
    places = "ranks on CPUs" if are_on_cpus(run.outcomes) else "GPUs"
    return f"{sweep.nodes} node{'' if sweep.nodes == 1 else 's'}, {sweep.num_gpus} {places}, {sweep.date}"


def wrong_text(engine: EngineResult | None) -> str:
    """Elements found wrong, `unchecked` where refits ran but nothing was compared, nothing where none ran."""
    if engine is None or not engine.measured_s:
        return ""
    return f"{engine.num_wrong:,}" if engine.num_compared else "unchecked"


def _side(side: SideSpec | None) -> str:
    return f"{side.title} ({side.world_size})" if side else ""


def _engine(entry: Entry) -> str:
    return title(entry.name) if entry.name else ""


def _median(entry: Entry) -> str:
    return marked_ms(entry.engine, None if entry.is_valid else entry.status.text)


def _range(entry: Entry) -> str:
    summary = entry.engine.summary if entry.engine else None
    return f"{1e3 * summary.min_s:.2f}-{1e3 * summary.max_s:.2f}" if summary else ""


def _cold(entry: Entry) -> str:
    return f"{1e3 * entry.engine.cold_total_s:.2f}" if entry.engine and entry.engine.cold_s else ""


def _payload(entry: Entry) -> str:
    cost = entry.outcome.cost
    return f"{cost.payload_bytes / 1e9:.3f}" if cost else ""


def _rate(entry: Entry) -> str:
    rate = entry.engine.bottleneck_gb_per_s if entry.engine else None
    return f"{rate:.3f}" if rate is not None else ""


def _bound(entry: Entry) -> str:
    bound = entry.outcome.bound
    return f"{1e3 * bound.seconds:.3f}" if bound else ""


def _share(entry: Entry) -> str:
    return f"{100 * entry.share_of_bound:.1f}" if entry.share_of_bound is not None else ""


def _ratio(entry: Entry) -> str:
    if entry.ratio is None:
        return ""
    return f"{entry.ratio:.2f}" + (f" ({entry.ratio_between})" if entry.ratio_between else "")


def _floor(entry: Entry) -> str:
    floor = entry.outcome.refit.floor
    return f"{1e3 * floor.seconds:.3f}" if floor else ""


def _relay(entry: Entry) -> str:
    hosts = entry.outcome.refit.hosts
    return hosts.relay if hosts else ""


def _of_hosts(name: str) -> Callable[[Entry], str]:
    """A cell with the bytes of that field of `HostTraffic`, in GB; empty on one host."""

    def cell(entry: Entry) -> str:
        nbytes = getattr(entry.outcome.refit.hosts, name, None)
        return f"{nbytes / 1e9:.3f}" if nbytes is not None else ""

    return cell


COLUMNS = (
    Shown("scenario", lambda entry: entry.outcome.planned.name, is_text=True),
    Shown("source", lambda entry: _side(entry.outcome.planned.source), is_text=True),
    Shown("target", lambda entry: _side(entry.outcome.planned.destination), is_text=True),
    Shown("mode", lambda entry: entry.outcome.planned.mode, is_text=True),
    Shown("method", lambda entry: entry.method, is_text=True),
    Shown("relay", _relay, is_text=True, may_lack=True),
    Shown("engine", _engine, is_text=True),
    Shown("status", lambda entry: entry.status.text, is_text=True),
    Shown("ranks", lambda entry: str(entry.outcome.planned.num_ranks)),
    Shown("median (ms)", _median),
    Shown("min-max (ms)", _range),
    Shown("cold (ms)", _cold),
    Shown("payload (GB)", _payload),
    Shown("between hosts (GB)", _of_hosts("between_bytes"), may_lack=True),
    Shown("without relay", _of_hosts("direct_bytes"), may_lack=True),
    Shown("in every plan", _of_hosts("least_bytes"), may_lack=True),
    Shown("within hosts (GB)", _of_hosts("within_bytes"), may_lack=True),
    Shown("bottleneck (GB/s)", _rate),
    Shown("lower bound (ms)", _bound),
    Shown("floor (ms)", _floor, may_lack=True),
    Shown("share (%)", _share),
    Shown("#wrong", lambda entry: wrong_text(entry.engine)),
    Shown("ratio", _ratio),
)
"""The columns, those of text first."""
