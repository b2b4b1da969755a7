"""Warnings: noisy timings, idle GPUs, and what to do."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from refit.config.flag_names import size_flag
from refit.config.registry import ENGINES
from refit.config.scenario import Mode, Scenario
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.sides import check_side
from refit.results.refit import EngineResult, RefitResult

MIN_ITERATIONS = 5
"""Fewer measured refits say little about spread."""

MAX_CV = 0.05
MAX_DRIFT = 0.05
CLEARLY_SLOWER = 1.2
"""A refit or rank slower than comparable ones by more than this factor gets a warning."""


def of_engine(name: str, engine: EngineResult, scenario: Scenario, result: RefitResult) -> list[str]:
    """`warning: ...` lines on an engine that was measured; with several engines each line names its engine."""
    whose = f"{ENGINES[name].title}: " if len(result.engines) > 1 else ""
    slow = list(_slow_host(engine, scenario, result)) or _straggler(engine, scenario, result)
    said = [engine.slow] if engine.slow is not None else []
    found = (*said, *_warm_up(engine), *_spread(engine), *slow)
    return [f"warning: {whose}{text}" for text in found]


def _warm_up(engine: EngineResult) -> Iterator[str]:
    first, *others = engine.measured_s
    num_warmup = len(engine.samples) - len(engine.measured_s)
    if not num_warmup:
        yield "no warm-up: the first refit's set-up is in the figures; use --num-benchmark-warmup 2"
    elif len(others) >= 2 and first > CLEARLY_SLOWER * statistics.median(others):
        slower = first / statistics.median(others)
        yield (
            f"the first measured refit took {slower:.1f} x the median of the others, so warm-up was too short: "
            f"use --num-benchmark-warmup {num_warmup + 3}"
        )


def _spread(engine: EngineResult) -> Iterator[str]:
    assert engine.summary is not None
    num_measured, cv, drift = len(engine.measured_s), engine.summary.cv, engine.summary.drift
    if num_measured < MIN_ITERATIONS:
        yield (
            f"{num_measured} measured refits say little about spread: "
            f"use --num-benchmark-iterations {MIN_ITERATIONS} or more"
        )
    if cv > MAX_CV:
        yield (
            f"times vary by {100 * cv:.0f} % (cv): look for other work on these machines and on the network between "
            f"them, or go by the median of --num-benchmark-iterations {4 * num_measured}"
        )
    if drift > MAX_DRIFT:
        yield (
            f"refits get slower by {100 * drift:.0f} % over the run: see whether it goes on with "
            f"--num-benchmark-iterations {4 * num_measured}, and whether clocks fall (nvidia-smi -q -d PERFORMANCE)"
        )
    elif drift < -MAX_DRIFT:
        num_warmup = len(engine.samples) - num_measured
        yield (
            f"refits get faster by {-100 * drift:.0f} % over the run: use --num-benchmark-warmup "
            f"{num_warmup + num_measured}"
        )


def _slow_host(engine: EngineResult, scenario: Scenario, result: RefitResult) -> Iterator[str]:
    """A host whose ranks of the destination are slowest in most refits, by more than their bytes explain."""
    on_host = _destination_by_host(scenario, result)
    measured = [sample for sample in engine.samples if not sample.warmup]
    if len(on_host) < 2 or len(measured) < 3:
        return
    seconds = [
        {host: max(sample.seconds_per_rank[rank] for rank in ranks) for host, ranks in on_host.items()}
        for sample in measured
    ]
    host, times = Counter(max(each, key=each.__getitem__) for each in seconds).most_common(1)[0]
    slower = statistics.median(each[host] / _of_others(each, host) for each in seconds)
    assert result.plan is not None
    received = result.plan.received_by_rank
    loads = {name: float(max(received.get(rank, 0) for rank in ranks)) for name, ranks in on_host.items()}
    usual = _of_others(loads, host)
    heavier = loads[host] / usual if usual else 1.0
    if times > len(measured) / 2 and slower > CLEARLY_SLOWER * max(1.0, heavier):
        yield (
            f"host {host} was slowest in {times} of {len(measured)} refits, {slower:.2f} x the median of the other "
            f"{len(on_host) - 1} with {heavier:.2f} x their bytes to a rank: look for a slow link (refit calibrate) or "
            "other work on it, and run without it if it stays"
        )


def _of_others(values: Mapping[str, float], host: str) -> float:
    return statistics.median(value for name, value in values.items() if name != host)


def _destination_by_host(scenario: Scenario, result: RefitResult) -> dict[str, list[int]]:
    """The destination's ranks on each host that has some; empty on a single host. Ranks fill hosts in order."""
    found: dict[str, list[int]] = {}
    first = 0
    for host, number in result.hosts.num_ranks.items() if result.hosts else ():
        ranks = [rank for rank in range(first, first + number) if rank in scenario.destination.ranks]
        found |= {host: ranks} if ranks else {}
        first += number
    return found


def _straggler(engine: EngineResult, scenario: Scenario, result: RefitResult) -> Iterator[str]:
    """A rank that is slowest in most refits, by more than its share of the bytes explains."""
    measured = [sample for sample in engine.samples if not sample.warmup]
    rank, times = Counter(sample.slowest_rank for sample in measured).most_common(1)[0]
    peers = _side_of(rank, scenario)
    if len(measured) < 3 or times <= len(measured) / 2 or len(peers) < 3:
        return
    slower = statistics.median(
        sample.seconds_per_rank[rank] / statistics.median(sample.seconds_per_rank[peer] for peer in peers)
        for sample in measured
    )
    assert result.plan is not None
    sent, received = result.plan.sent_by_rank, result.plan.received_by_rank
    loads = {peer: max(sent.get(peer, 0), received.get(peer, 0)) for peer in peers}
    usual = statistics.median(loads.values())
    heavier = loads[rank] / usual if usual else 1.0
    if slower > CLEARLY_SLOWER * max(1.0, heavier):
        yield (
            f"rank {rank} was slowest in {times} of {len(measured)} refits, {slower:.2f} x the median rank of its "
            f"side with {heavier:.2f} x its bytes: look for other work on its node and at its GPU (nvidia-smi -q -d "
            "PERFORMANCE), and run without the node (--exclude of sbatch and salloc) if it stays"
        )


def _side_of(rank: int, scenario: Scenario) -> range:
    """The ranks of the larger side that `rank` is on; empty for an idle one."""
    sides = (side.ranks for side in scenario.sides.values())
    return max((ranks for ranks in sides if rank in ranks), key=len, default=range(0))


def idle_ranks(scenario: Scenario, world_size: int) -> str:
    """A `warning: ...` line on idle ranks and on layouts that use them; empty where no rank is idle."""
    idle = range(scenario.num_ranks, world_size)
    if not idle:
        return ""
    which = f"rank {idle[0]} does" if len(idle) == 1 else f"ranks {idle[0]}-{idle[-1]} do"
    uses = next((text for text, side in _larger(scenario, world_size) if _can_be_built(scenario, side)), None)
    remedy = f"start {scenario.num_ranks} ranks" + (f", or use them all with {uses}" if uses else "")
    return f"warning: {which} nothing, {scenario.num_ranks_text} of {world_size} are used: {remedy}"


def _larger(scenario: Scenario, world_size: int) -> Iterator[tuple[str, SideSpec]]:
    """Sides with a larger EP or TP that leave no rank idle: the flags to give, and the side.

    Flags for the source include the destination's size, which would otherwise default to the source's.
    """
    for name in ("destination", "source"):
        side = scenario.sides[name]
        layout, destination = side.layout, scenario.destination.layout
        other = scenario.num_ranks - side.world_size if scenario.mode is Mode.NON_COLLOCATED else 0
        factor, left = divmod(world_size - other, side.world_size)
        if left or side.world_size != layout.tp * layout.ep * layout.pp:
            continue
        ranks = side.world_size * factor
        grown = replace(layout, ep=layout.ep * factor, world_size=ranks)
        yield _flags(name, "ep", grown.ep, destination.ep), replace(side, layout=grown)
        if layout.etp == layout.tp:  # ETP defaults to TP
            tp = layout.tp * factor
            grown = replace(layout, tp=tp, etp=tp, world_size=ranks)
            yield _flags(name, "tp", tp, destination.tp), replace(side, layout=grown)


def _flags(side: str, size: str, number: int, destination_number: int) -> str:
    kept = f"{size_flag('destination', size)} {destination_number if side == 'source' else number}"
    return f"{size_flag('source', size)} {number} {kept}" if side == "source" else kept


def _can_be_built(scenario: Scenario, side: SideSpec) -> bool:
    if scenario.model is None:
        return False
    try:
        check_side(scenario.model, side, "")
    except UsageError:
        return False
    return True
