"""What the log of a run says: header, one line per iteration, the times, the table and the verdict."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from refit import units
from refit.config.scenario import Mode
from refit.report.grid import rendered
from refit.results.result import EngineResult, Result, Sample

ENGINE_TITLES = {"refit": "refit", "megatron": "Megatron-Core"}
MAX_WRONG_LINES = 12
TABLE_WIDTH = 120
"""Columns of a log file; on a terminal its own width counts."""


def header(result: Result, notes: Sequence[str], bound: str) -> str:
    """The `#` lines a log opens with: versions, host, scenario, model, bytes, and what `bound` says of the lower
    bound."""
    versions = ", ".join(f"{name} {version}" for name, version in result.environment["versions"].items())
    gpus = [gpu["name"] for gpu in result.environment["gpus"]]
    devices = (
        f"{len(gpus)} x {gpus[0]}" if gpus else f"{result.environment['num_cpus']} cores of {result.environment['cpu']}"
    )
    scenario, moved = result.scenario, result.bytes
    lines = [
        versions,
        f"{result.environment['host']}: {devices}",
        f"{_mapping(result)}, {scenario['mode']}, {scenario['method']}, verify {scenario['verify']}",
        f"model {scenario['model_name'] or scenario['model_provider'] or 'from flags'}: "
        f"{scenario['num_parameters']:,} elements in {scenario['num_tensors']} tensors, "
        f"{' and '.join(scenario['dtypes'])}",
        f"payload {units.gb(moved['payload'])}: wire {units.gb(moved['wire'])}, local {units.gb(moved['local'])}"
        f" in {result.plan['num_transfers']} transfers (plan {result.plan['digest'][:12]})",
        f"busiest: {_busiest(moved)}; busiest sender {moved['sender_imbalance']:.2f} x the mean",
    ]
    if bound:
        lines.append(f"lower bound: {bound}")
    casts = result.plan["casts"]
    if casts:
        key, (before, after) = next(iter(casts.items()))
        lines.append(f"cast: {len(casts)} tensors change dtype, {key} from {before} to {after}")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(f"# {line}" for line in lines)


def _mapping(result: Result) -> str:
    """`TP8 EP8 -> TP8 EP4 (64+32, 0 idle)`; where both sides share GPUs `(128 shared, 0 idle)`."""
    source, destination = (result.layouts[side]["world_size"] for side in ("source", "destination"))
    world_size = result.scenario["world_size"]
    if result.scenario["mode"] == Mode.NON_COLLOCATED.value:
        ranks, used = f"{source}+{destination}", source + destination
    else:
        used = max(source, destination)
        ranks = f"{used} shared" if source == destination else f"{source} and {destination} on the same {used}"
    return f"{result.scenario['title']} ({ranks}, {world_size - used} idle)"


def _busiest(moved: Mapping[str, Any]) -> str:
    sender, receiver = (
        max(loads, key=loads.__getitem__) for loads in (moved["sent_by_rank"], moved["received_by_rank"])
    )
    sent, received = moved["sent_by_rank"][sender], moved["received_by_rank"][receiver]
    if received >= sent:
        return f"rank {receiver} receives {units.gb(received)}"
    return f"rank {sender} sends {units.gb(sent)}"


def iteration_line(engine: str, sample: Sample, number: int, total: int) -> str:
    """`refit 3/5: 12.34 ms (slowest rank 4: pack 1.20, wire 10.00, rest 1.14)`."""
    label = f"warm-up {number}/{total}" if sample.warmup else f"{number}/{total}"
    phases = "".join(f"{name} {1e3 * seconds:.2f}, " for name, seconds in sample.phases_s.items())
    wrong = f"  {sample.num_wrong:,} WRONG" if sample.num_wrong else ""
    return (
        f"{ENGINE_TITLES[engine]} {label}: {1e3 * sample.seconds:.2f} ms "
        f"(slowest rank {sample.slowest_rank}: {phases}rest {1e3 * sample.unattributed_s:.2f}){wrong}"
    )


def times(engine: EngineResult, bound: Mapping[str, Any] | None) -> str:
    """The lines summaries are made from, in the wording of the suite's first users."""
    summary, share = engine.summary, engine.share_of_lower_bound
    connected = "" if engine.connect_s is None else f" (connections before it: {1e3 * engine.connect_s:.2f} ms)"
    reached = (
        [] if bound is None else [f"Lower bound: {1e3 * bound['lower_bound_s']:.2f} ms, reached {_percent(share)} %"]
    )
    return "\n".join(
        [
            f"Mean refit time: {1e3 * summary['mean_s']:.2f} ms",
            f"Min refit time:  {1e3 * summary['min_s']:.2f} ms",
            f"Max refit time:  {1e3 * summary['max_s']:.2f} ms",
            f"Median refit time: {1e3 * summary['median_s']:.2f} ms, p95 {1e3 * summary['p95_s']:.2f} ms",
            f"Bottleneck bandwidth: {_gb_per_s(engine)} GB/s",
            *reached,
            "Cold refit: "
            + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in engine.cold_s.items())
            + connected,
        ]
    )


def table(engines: Mapping[str, EngineResult]) -> str:
    """One row per engine, fixed width, with a units row."""
    grid = Table(box=None, pad_edge=False, header_style="")
    for name, unit in (
        ("engine", ""),
        ("median", "(ms)"),
        ("mean", "(ms)"),
        ("min", "(ms)"),
        ("max", "(ms)"),
        ("first", "(ms)"),
        ("bottleneck", "(GB/s)"),
        ("of bound", "(%)"),
        ("staging", "(MiB)"),
        ("#wrong", ""),
        ("status", ""),
    ):
        grid.add_column(f"{name}\n{unit}", justify="left" if name in ("engine", "status") else "right", no_wrap=True)
    for name, engine in engines.items():
        grid.add_row(ENGINE_TITLES[name], *_cells(engine), engine.status)
    return _render(grid)


def _cells(engine: EngineResult) -> list[str]:
    if not engine.summary:
        return ["-"] * 9
    milliseconds = [f"{1e3 * engine.summary[f'{name}_s']:.2f}" for name in ("median", "mean", "min", "max")]
    staging = max(engine.staging_bytes_per_rank, default=0) / 2**20
    return [
        *milliseconds,
        f"{1e3 * sum(engine.cold_s.values()):.2f}",
        _gb_per_s(engine),
        _percent(engine.share_of_lower_bound),
        f"{staging:.1f}",
        f"{engine.num_wrong:,}" if engine.num_compared else "unchecked",
    ]


def _gb_per_s(engine: EngineResult) -> str:
    return "-" if engine.bottleneck_gb_per_s is None else f"{engine.bottleneck_gb_per_s:.3f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g}"


def ratio(engines: Mapping[str, EngineResult]) -> str:
    """How the two engines of one run compare; empty unless both have times."""
    ours, peer = engines.get("refit"), engines.get("megatron")
    if ours is None or peer is None or not ours.summary or not peer.summary:
        return ""
    steady = peer.summary["median_s"] / ours.summary["median_s"]
    first = sum(peer.cold_s.values()) / sum(ours.cold_s.values())
    return f"Ratio: refit is {steady:.2f} x as fast as Megatron-Core's own (median), {first:.2f} x on the first refit"


def wrong_weights(name: str, engine: EngineResult) -> str:
    """Which tensors hold how many wrong elements on which rank; the last iteration's, as every one is checked."""
    if not engine.wrong:
        return ""
    last = max(wrong.iteration for wrong in engine.wrong)
    rows = sorted((w for w in engine.wrong if w.iteration == last), key=lambda w: (-w.num_wrong, w.key, w.rank))
    lines = [f"{ENGINE_TITLES[name]}: wrong elements after refit {last}"]
    for wrong in rows[:MAX_WRONG_LINES]:
        lines.append(
            f"  rank {wrong.rank}  {wrong.key}: {wrong.num_wrong:,} wrong, first at {wrong.first_index}: "
            f"expected {wrong.expected:g}, found {wrong.found:g}"
        )
    if len(rows) > MAX_WRONG_LINES:
        lines.append(f"  and {len(rows) - MAX_WRONG_LINES} more (rank, tensor) pairs, all in the result file")
    return "\n".join(lines)


def forward_line(name: str, forward: Mapping[str, Any]) -> str:
    """What `--check-forward` found."""
    title = ENGINE_TITLES[name]
    if forward["skipped"] is not None:
        return f"Forward check ({title}) waived: {forward['skipped']}"
    return (
        f"Forward check ({title}) {'passed' if forward['passed'] else 'FAILED'}: logits agree at "
        f"{100 * forward['agreement']:.0f} % of tokens, largest difference {forward['max_difference']:.3g} "
        f"beside logits up to {forward['max_logit']:.3g}"
    )


def profile_table(name: str, engine: EngineResult) -> str:
    """What the GPU of the slowest rank did in the profiled refit; empty where nothing ran on one."""
    rank = engine.samples[-1].slowest_rank
    if not engine.profile or not engine.profile[rank]:
        return ""
    grid = Table(box=None, pad_edge=False, header_style="")
    for title in ("stream", "kind", "launches", "busy (ms)", "from (ms)", "to (ms)"):
        grid.add_column(title, justify="left" if title == "kind" else "right", no_wrap=True)
    for each in engine.profile[rank]:
        times = [f"{1e3 * each[key]:.2f}" for key in ("busy_s", "first_s", "last_s")]
        grid.add_row(str(each["stream"]), each["kind"], str(each["num_launches"]), *times)
    return f"Profile of one more {ENGINE_TITLES[name]} refit, rank {rank}\n{_render(grid)}"


def verdict(name: str, engine: EngineResult, verify: str) -> str:
    """One line: what was compared and what was wrong, or why nothing was."""
    title = ENGINE_TITLES[name]
    if engine.status in ("waived", "failed"):
        return f"{engine.status.upper()} ({title}): {engine.reason}"
    if verify == "off":
        return f"UNVERIFIED ({title}): --verify off, nothing was compared"
    how = "" if verify == "full" else f" (--verify {verify}: every 16th row)"
    outcome = "PASSED" if engine.num_wrong == 0 else "FAILED"
    return (
        f"{outcome} ({title}): {engine.num_compared:,} elements compared{how} over {len(engine.samples)} refits, "
        f"{engine.num_wrong:,} wrong"
    )


def _render(grid: Table) -> str:
    return rendered(grid, None if sys.stdout.isatty() else TABLE_WIDTH)
