"""Whether a scenario's models fit its GPUs, and which layouts would fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from refit import units
from refit.config.delta import Snapshot
from refit.config.flag_names import size_flag
from refit.config.gpus import planned_gpus
from refit.config.layout import Layout
from refit.errors import UsageError
from refit.predict.dry_run import DryRun, held_on
from refit.predict.sides import check_side, most_encoding_bytes, predict_side, predict_sides, training_bytes

MAX_EP_FACTOR = 64
"""Largest factor by which EP is raised in search of a layout that fits."""

MAX_TRIES = 8
"""Most layouts of each kind that are predicted in search of one that fits."""


@dataclass(frozen=True, slots=True)
class _Change:
    """A remedy: new layouts for the sides that need too much, and its text."""

    layouts: dict[str, Layout]
    text: str


def check_memory(run: DryRun) -> None:
    """Raise UsageError, with both figures and what would fit, where a GPU of the cluster has less than a side needs.

    Passes where no cluster is given or its memory is not known.
    """
    cluster = run.options.cluster
    if cluster is None or cluster.gpu_memory_bytes is None:
        return
    staging = run.staging_bytes
    for side, held in run.held_bytes.items():
        weights = max(held.values())
        if weights + staging <= cluster.gpu_memory_bytes:
            continue
        subject = f"both sides ({run.scenario.title}) need" if side == "both" else f"the {side} needs"
        available = cluster.gpu_memory_bytes
        if run.gpus.is_shared:
            subject = f"{run.gpus.most_ranks} ranks of a GPU ({run.scenario.title}) need"
            remedies = [*_lower_staging(run, weights, available), *_fewer_ranks(run, available)]
        else:
            remedies = [*_lower_staging(run, weights, available), *_fitting_layouts(run, side, available)]
        remedies = [*_snapshot_on_host(run, side, available), *remedies]
        raise UsageError(
            f"{subject} {units.gb(weights + staging)} per GPU ({units.gb(weights)} of {run.held_text(side)}, "
            f"{units.gb(staging)} of staging), {cluster.name} has {units.gb(cluster.gpu_memory_bytes)}: "
            f"{', or '.join(remedies) or 'raise TP, EP or PP, or use GPUs with more memory'}"
        )


def _snapshot_on_host(run: DryRun, side: str, available: int) -> list[str]:
    """Where that alone suffices."""
    delta = run.scenario.delta
    if delta is None or delta.snapshot is Snapshot.HOST:
        return []
    moved = replace(run, encoding_needs={work: held for work, held in run.encoding_needs.items() if work != "snapshot"})
    fits = max(moved.held_bytes[side].values()) + run.staging_bytes <= available
    return ["keep the snapshot in the host's memory with --delta-snapshot host"] if fits else []


def _lower_staging(run: DryRun, weights: int, available: int) -> list[str]:
    left_mib = (available - weights) // run.num_programs >> 20
    return [f"lower --staging-mib to {left_mib}"] if left_mib > 0 else []


def _fewer_ranks(run: DryRun, available: int) -> list[str]:
    """The most ranks of a GPU that fit, on more GPUs."""
    num_ranks, staging = run.scenario.num_ranks, run.scenario.staging_bytes
    for fewer in range(run.gpus.most_ranks - 1, 0, -1):
        gpus = planned_gpus(num_ranks, run.options.gpus_per_node, fewer)
        if max(held_on(gpus, run.held_by_rank).values()) + staging * gpus.most_ranks <= available:
            return [f"lower --ranks-per-gpu to {fewer} ({-(-num_ranks // fewer)} GPUs)"]
    return []


def _fitting_layouts(run: DryRun, side: str, available: int) -> list[str]:
    """The first change of each kind that fits."""
    sides = ["source", "destination"] if side == "both" else [side]
    kinds = (_etp_at_tp(run, sides), _higher_ep(run, sides))
    built = (itertools.islice((change for change in kind if _can_be_built(run, change)), MAX_TRIES) for kind in kinds)
    first = (next((change for change in kind if _fits(run, change, available)), None) for kind in built)
    return [change.text for change in first if change]


def _can_be_built(run: DryRun, change: _Change) -> bool:
    """Whether the model can be sharded this way."""
    try:
        for name, layout in change.layouts.items():
            check_side(run.model, replace(run.scenario.sides[name], layout=layout), name)
    except UsageError:
        return False
    return True


def _fits(run: DryRun, change: _Change, available: int) -> bool:
    try:
        return _needed(run, change) <= available
    except UsageError:  # an encoding that cannot send to these layouts
        return False


def _needed(run: DryRun, change: _Change) -> int:
    """Bytes on the fullest GPU with this change, or a little more."""
    changed = {name: replace(run.scenario.sides[name], layout=layout) for name, layout in change.layouts.items()}
    scenario = replace(run.scenario, source=changed.get("source", run.scenario.source))
    sides = {**run.scenario.sides, **changed}
    encoding = dict[str, Mapping[int, int]]()
    if scenario.encodings:
        source, destination = predict_sides(run.model, sides["source"], sides["destination"])
        encoding = most_encoding_bytes(source, destination, sides["destination"], scenario.sending)
    fullest = 0
    for name in changed:
        training = training_bytes(scenario) if name == "source" else {}
        extra = {rank: needed.total_bytes for rank, needed in training.items()}
        more, held = encoding.get(name, {}), predict_side(run.model, sides[name]).bytes_per_rank
        fullest += max(nbytes + extra.get(rank, 0) + more.get(rank, 0) for rank, nbytes in held.items())
    return fullest + run.scenario.staging_bytes


def _etp_at_tp(run: DryRun, sides: list[str]) -> Iterator[_Change]:
    """ETP raised to TP on every side where it is lower: experts are then split over TP as well, not replicated."""
    layouts = {side: _layout(run, side) for side in sides}
    raised = {side: _with(layout, etp=layout.tp) for side, layout in layouts.items() if layout.etp < layout.tp}
    changed = {side: layout for side, layout in raised.items() if layout}
    if changed and len(changed) == len(raised):
        flags = " and ".join(f"{size_flag(side, 'etp')} at TP = {layout.tp}" for side, layout in changed.items())
        yield _Change({**layouts, **changed}, f"leave {flags}")


def _higher_ep(run: DryRun, sides: list[str]) -> Iterator[_Change]:
    """EP raised on every side, on the same ranks where its ETP x EP x PP still divides them, else on more."""
    for factor in range(2, MAX_EP_FACTOR + 1):
        changed = {side: grown for side in sides if (grown := _with_ep(_layout(run, side), factor))}
        if len(changed) == len(sides):
            texts = [f"{size_flag(side, 'ep')} to {layout.ep}{_on(side, layout)}" for side, layout in changed.items()]
            yield _Change(changed, f"raise {' and '.join(texts)}")


def _on(side: str, layout: Layout) -> str:
    if layout.world_size == layout.tp * layout.ep * layout.pp:
        return f" ({layout.world_size} GPUs)"
    return f" with {size_flag(side, 'world_size')} {layout.world_size}"


def _with_ep(layout: Layout, factor: int) -> Layout | None:
    ep = layout.ep * factor
    return _with(layout, ep=ep) or _with(layout, ep=ep, world_size=layout.tp * ep * layout.pp)


def _with(layout: Layout, **sizes: int) -> Layout | None:
    try:
        return replace(layout, **sizes)  # type: ignore[arg-type]
    except UsageError:
        return None


def _layout(run: DryRun, side: str) -> Layout:
    return run.scenario.sides[side].layout
