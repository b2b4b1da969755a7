"""The log lines of a refit: header, one line per iteration, times, table, headlines and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from refit import units
from refit.config.registry import ENGINES
from refit.config.relay import Relay
from refit.config.scenario import Mode, Scenario
from refit.plan.cost import Cost
from refit.report.plans.bound_text import estimate_text, floor_text
from refit.report.refits import warnings
from refit.report.refits.delta_lines import delta_lines
from refit.report.refits.headline import headlines, title
from refit.report.refits.served_lines import engine_lines
from refit.report.terminal.console import table_width
from refit.report.terminal.escaped import FILE_WIDTH, plain_lines
from refit.report.terminal.grid import Column, fitted
from refit.results.refit import EngineResult, HostTraffic, QuantisedRefit, RefitResult, Sample
from refit.results.result import Environment, Result
from refit.results.runs import outcome_of
from refit.results.stats import STABLE_WIDTH, Stability
from refit.results.status import Status

MAX_WRONG_LINES = 12
SHORT_S = 1e-3
"""Connecting that took less is not stated: the cold refit's line says the same without it."""


def header(
    scenario: Scenario,
    environment: Environment,
    world_size: int,
    result: RefitResult,
    notes: Sequence[str],
    bound: str,
) -> str:
    """The first lines of a log, with `#`: versions, host, scenario, model, bytes, lower bound (the text `bound`)."""
    facts, plan = result.model, result.plan
    assert facts is not None
    assert plan is not None
    gpus = [gpu.name for gpu in environment.gpus]
    lines = [
        ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        f"{environment.host}: "
        + (f"{len(gpus)} x {gpus[0]}" if gpus else f"{environment.num_cpus} cores of {environment.cpu}"),
        f"{_mapping(scenario, world_size)}, {scenario.mode.value}, {scenario.way}, verify {scenario.verify.value}",
        f"model {scenario.model_title or 'from flags'}: {facts.num_parameters:,} elements in {facts.num_tensors} "
        f"tensors, {' and '.join(facts.dtypes)}",
        f"payload {units.gb(plan.payload_bytes)}: wire {units.gb(plan.wire_bytes)}, local {units.gb(plan.local_bytes)}"
        f" in {plan.num_transfers} transfers (plan {plan.digest[:12]})",
        f"busiest: {busiest_text(plan)}; busiest sender {plan.sender_imbalance:.2f} x the mean",
    ]
    lines += [hosts_line(result.hosts)] if result.hosts else []
    lines += [f"lower bound: {bound}"] if bound else []
    lines += [f"estimate: {estimate_text(result.estimate_s)}"] if result.estimate_s else []
    lines += [f"floor of all plans: {floor_text(result.floor)}"] if result.floor else []
    if plan.casts:
        key, (before, after) = next(iter(plan.casts.items()))
        lines.append(f"cast: {len(plan.casts)} tensors change dtype, {key} from {before} to {after}")
    lines += quantised_lines(result.quantised) if result.quantised else []
    lines += [f"note: {note}" for note in notes]
    return plain_lines(f"# {line}" for line in lines)


def hosts_line(hosts: HostTraffic) -> str:
    """`2 hosts: 33 MB between them, 20 MB within, relay node; without it 61 MB, in every plan 33 MB cross`."""
    relayed = hosts.relay != Relay.OFF.value and hosts.direct_bytes is not None
    without = f"without it {units.gb(hosts.direct_bytes or 0)}, " if relayed else ""
    return (
        f"{len(hosts.num_ranks)} hosts: {units.gb(hosts.between_bytes)} between them, {units.gb(hosts.within_bytes)} "
        f"within, relay {hosts.relay}; {without}in every plan {units.gb(hosts.least_bytes)} cross"
    )


def quantised_lines(quantised: QuantisedRefit) -> list[str]:
    """The dtype, rule and blocks of an FP8 destination, where they were quantised, and what stays BF16."""
    blocks = (quantised.blocks_at_source, quantised.blocks_at_destination)
    lines = [
        f"{quantised.dtype}: {quantised.num_tensors} tensors in blocks of {quantised.block}, rule {quantised.rule} "
        f"({quantised.rule_source})",
        f"quantised at the source: {blocks[0]:,} blocks, at the destination: {blocks[1]:,}; "
        f"{quantised.num_kept} tensors stay BF16 ({', '.join(quantised.kept)}, and those of one dim)",
    ]
    reasons = "; ".join(f"{reason}: {count} tensors" for reason, count in quantised.reasons.items())
    return [*lines, f"quantised at the destination because of {reasons}"] if reasons else lines


def _mapping(scenario: Scenario, world_size: int) -> str:
    """`TP8 EP8 -> TP8 EP4 (64+32, 0 idle)`; where both sides share GPUs `(128 shared, 0 idle)`."""
    source, destination = scenario.source.world_size, scenario.destination.world_size
    if scenario.mode is Mode.NON_COLLOCATED:
        ranks = f"{source}+{destination}"
    else:
        used = scenario.num_ranks
        ranks = f"{used} shared" if source == destination else f"{source} and {destination} on the same {used}"
    shared = f", up to {scenario.ranks_per_gpu} per GPU" if scenario.ranks_per_gpu > 1 else ""
    return f"{scenario.title} ({ranks}, {world_size - scenario.num_ranks} idle{shared})"


def busiest_text(plan: Cost) -> str:
    """`rank 64 receives 66.64 GB`."""
    return f"rank {plan.busiest.rank} {plan.busiest.direction} {units.gb(plan.busiest.nbytes)}"


def closing_lines(result: RefitResult, run: Result) -> list[str]:
    """The last lines of a log: times, warnings, wrong weights, the table, the headlines and the verdicts."""
    engines, scenario = result.engines, run.scenario
    assert scenario is not None
    lines = []
    for name, engine in engines.items():
        if engine.summary:
            lines += [times(engine)] if len(engines) == 1 else []
            lines += [stability_line(name, engine.stability)] if engine.stability else []
            lines += warnings.of_engine(name, engine, scenario, result)
            lines += engine_lines(name, engine)
        lines += [wrong_weights(name, engine), not_moved(name, engine), sent(name, engine)]
    lines += delta_lines(result, table_width())
    lines += [start(result), table(engines, table_width()), *headlines(outcome_of(run.run_id, run))]
    lines += calibrated_lines(result, scenario)
    lines += (verdict(name, engine, scenario.verify.value) for name, engine in engines.items())
    if result.rearranged is not None:
        after = replace(run, measurements={**run.measurements, "refit": result.rearranged})
        lines += ["After the experts were placed anew:", *closing_lines(result.rearranged, after)]
    return lines


def calibrated_lines(result: RefitResult, scenario: Scenario) -> list[str]:
    """How far the lower bound was from what was measured, where `refit calibrate` has measured the cluster."""
    cluster, bound, engine = scenario.cluster, result.bound, result.tested
    if cluster is None or cluster.measured is None or bound is None or not bound.seconds:
        return []
    if engine is None or engine.median_s is None or engine.doubt is not None or engine.sent_share is not None:
        return []
    return [
        f"Links as measured on {cluster.measured} ({cluster.name}): the median of {units.seconds(engine.median_s)} is "
        f"{engine.median_s / bound.seconds:.2f} x the lower bound of {units.seconds(bound.seconds)}"
        + (
            f", {engine.median_s / result.estimate_s:.2f} x the estimate of {units.seconds(result.estimate_s)}"
            if result.estimate_s
            else ""
        )
    ]


def iteration_line(engine: str, sample: Sample, number: str) -> str:
    """`refit 3/5: 12.34 ms (slowest rank 4: pack 1.20, wire 10.00, rest 1.14; beside them quantise 3.20)`."""
    label = f"warm-up {number}" if sample.warmup else number
    phases = "".join(f"{name} {1e3 * seconds:.2f}, " for name, seconds in sample.phases_s.items())
    beside = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in sample.beside_s.items())
    beside = f"; beside them {beside}" if beside else ""
    num_wrong = sample.num_wrong + sample.engine_wrong
    wrong = f"  {num_wrong:,} WRONG" if num_wrong else ""
    pause = "" if sample.pause_s is None else f", engine pause {1e3 * sample.pause_s:.2f}"
    return (
        f"{ENGINES[engine].title} {label}: {1e3 * sample.seconds:.2f} ms{pause} "
        f"(slowest rank {sample.slowest_rank}: {phases}rest {1e3 * sample.unattributed_s:.2f}{beside}){wrong}"
    )


def times(engine: EngineResult) -> str:
    """The times of one engine. Scripts search for the first three lines: keep their wording."""
    summary = engine.summary
    assert summary is not None
    connects = (engine.connect_s or 0.0) >= SHORT_S
    connected = f"; connections before it {1e3 * (engine.connect_s or 0.0):.2f} ms" if connects else ""
    parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in engine.cold_s.items())
    cold = [f"Cold refit: {1e3 * engine.cold_total_s:.2f} ms ({parts}){connected}"] if parts else []
    return "\n".join(
        [
            f"Mean refit time: {1e3 * summary.mean_s:.2f} ms",
            f"Min refit time:  {1e3 * summary.min_s:.2f} ms",
            f"Max refit time:  {1e3 * summary.max_s:.2f} ms",
            *cold,
            *([_first_refit(engine)] if connects else []),
        ]
    )


def stability_line(name: str, stability: Stability) -> str:
    """Whether `--repeat-until-stable` reached its aim, and the median's confidence interval."""
    title, refits = ENGINES[name].title, f"after {stability.num_refits} refits"
    if stability.width is None or stability.low_s is None or stability.high_s is None:
        return f"NOT STABLE ({title}): too few samples {refits}"
    interval = (
        f"the {100 * (stability.confidence or 0):.0f} % confidence interval of the median is "
        f"{1e3 * stability.low_s:.2f} to {1e3 * stability.high_s:.2f} ms"
    )
    if stability.is_stable:
        return f"Stable ({title}) {refits}: {interval}, within {100 * stability.width:.1f} %"
    return (
        f"NOT STABLE ({title}) {refits}: {interval}, up to {100 * stability.width:.1f} % away: "
        f"{100 * STABLE_WIDTH:.0f} % was wanted"
    )


def _first_refit(engine: EngineResult) -> str:
    """The first refit as a user meets it, as one figure, and what connecting took."""
    memory = max(engine.connect_memory_bytes_per_rank, default=0)
    taken = f", connections take {memory / 2**20:.0f} MiB" if memory > 0 else ""
    what = f" ({engine.connected}{taken})" if engine.connected else ""
    return f"First refit with connections: {1e3 * engine.first_with_connections_s:.2f} ms{what}"


def start(result: RefitResult) -> str:
    """`Start: 7.21 s to the end of the first refit: imports 3.10, process group 0.20, ...`; empty without one."""
    if not result.start_s:
        return ""
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in result.start_s.items())
    return f"Start: {sum(result.start_s.values()):.2f} s to the end of the first refit, slowest ranks: {phases}"


COLUMNS = (
    Column("engine", is_text=True),
    Column("over", is_text=True),
    Column("median", "(ms)"),
    Column("p95", "(ms)"),
    Column("min", "(ms)"),
    Column("max", "(ms)"),
    Column("cold", "(ms)"),
    Column("bottleneck", "(GB/s)"),
    Column("of bound", "(%)"),
    Column("staging", "(MiB)"),
    Column("#wrong"),
    Column("status", is_text=True),
)
OF_BOUND = 8
"""The place of the column that only results with a bound have."""


def table(engines: Mapping[str, EngineResult], width: int = FILE_WIDTH) -> str:
    """One row per engine; the column of a bound only where there is one."""
    rows = [
        [title(name), engine.transport or "-", *_cells(engine), _status(engine)] for name, engine in engines.items()
    ]
    has_bound = any(engine.share_of_lower_bound is not None for engine in engines.values())
    shown = [place for place in range(len(COLUMNS)) if has_bound or place != OF_BOUND]
    return fitted([COLUMNS[place] for place in shown], [[row[place] for place in shown] for row in rows], width)


def _status(engine: EngineResult) -> str:
    return engine.doubt if engine.doubt == "partial" else engine.verdict.text


def _cells(engine: EngineResult) -> list[str]:
    if not engine.summary:
        return ["-"] * 9
    summary = engine.summary
    seconds = (summary.median_s, summary.p95_s, summary.min_s, summary.max_s, engine.cold_total_s)
    staging = max(engine.staging_bytes_per_rank, default=0) / 2**20
    rate, share = engine.bottleneck_gb_per_s, engine.share_of_lower_bound
    return [
        *(f"{1e3 * each:.2f}" for each in seconds),
        "-" if rate is None else f"{rate:.3f}",
        "-" if share is None else f"{100 * share:.3g}",
        f"{staging:.1f}",
        f"{engine.num_wrong:,}" if engine.num_compared else "unchecked",
    ]


def wrong_weights(name: str, engine: EngineResult) -> str:
    """Tensors with wrong elements, their ranks and counts, of the last iteration with any."""
    if not engine.wrong:
        return ""
    last = max(wrong.iteration for wrong in engine.wrong)
    rows = sorted((w for w in engine.wrong if w.iteration == last), key=lambda w: (-w.num_wrong, w.key, w.rank))
    lines = [f"{ENGINES[name].title}: wrong elements after refit {last}"]
    for wrong in rows[:MAX_WRONG_LINES]:
        lines.append(
            f"  rank {wrong.rank}  {wrong.key}: {wrong.num_wrong:,} wrong, first at {wrong.first_index}: "
            f"expected {_number(wrong.expected)}, found {_number(wrong.found)}"
        )
    if len(rows) > MAX_WRONG_LINES:
        lines.append(f"  and {len(rows) - MAX_WRONG_LINES} more (rank, tensor) pairs, all in the result file")
    return "\n".join(lines)


def not_moved(name: str, engine: EngineResult) -> str:
    """The tensors that an engine left as they were, by reason; empty where it moved all."""
    return "\n".join(
        f"{ENGINES[name].title}: not moved: {each.num_tensors:,} tensors, {units.gb(each.nbytes)}, "
        f"{each.num_elements:,} elements: {each.reason} ({', '.join(each.first_keys)}"
        f"{', ...' if each.num_tensors > len(each.first_keys) else ''})"
        for each in engine.not_moved
    )


def sent(name: str, engine: EngineResult) -> str:
    """`refit: sent 1.23 GB of at most 4.56 GB in the last refit; 27 % over all`; empty where the plan has the bytes,
    and where a table has them share by share."""
    share = engine.sent_share
    if share is None or engine.asked_shares:
        return ""
    last = engine.samples[-1]
    found, most = units.gb(last.sent_bytes or 0), units.gb(last.most_sent_bytes or 0)
    return f"{ENGINES[name].title}: sent {found} of at most {most} in the last refit, {100 * share:.1f} % over all"


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:g}"


def profile_table(name: str, engine: EngineResult) -> str:
    """GPU activities of the profiled refit, on the slowest rank of the last refit; empty where there are none."""
    rank = engine.samples[-1].slowest_rank
    if not engine.profile or not engine.profile[rank]:
        return ""
    rows = [
        [each.kind, str(each.stream), str(each.num_launches)]
        + [f"{1e3 * seconds:.2f}" for seconds in (each.busy_s, each.first_s, each.last_s)]
        for each in engine.profile[rank]
    ]
    heading = f"Profile of one more {ENGINES[name].title} refit, rank {rank}"
    return f"{heading}\n{fitted(PROFILE_COLUMNS, rows, table_width())}"


PROFILE_COLUMNS = (
    Column("kind", is_text=True),
    Column("stream"),
    Column("launches"),
    Column("busy", "(ms)"),
    Column("from", "(ms)"),
    Column("to", "(ms)"),
)


def verdict(name: str, engine: EngineResult, verify: str) -> str:
    """One line: what was compared and what was wrong, or why nothing was."""
    title = ENGINES[name].title
    if engine.status in (Status.WAIVED, Status.FAILED):
        return f"{engine.status.value.upper()} ({title}): {engine.reason}"
    if verify == "off" and engine.fault:
        return f"FAILED ({title}): --verify off, no element was compared; {engine.fault}"
    if verify == "off":
        return f"UNVERIFIED ({title}): --verify off, nothing was compared"
    how = "" if verify == "full" else f" (--verify {verify}: every 16th row)"
    outcome = "FAILED" if engine.fault else "PASSED"
    return (
        f"{outcome} ({title}): {engine.num_compared:,} elements compared{how} over {len(engine.samples)} refits, "
        f"{engine.num_wrong:,} wrong"
        + (f"; {engine.num_wrong_in_engine:,} wrong in the engine" if engine.num_wrong_in_engine else "")
        + (f"; {sum(each.num_tensors for each in engine.not_moved):,} tensors not moved" if engine.not_moved else "")
        + "".join(f"; {wrong}" for wrong in engine.wrong_passes)
    )
