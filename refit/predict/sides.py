"""Predicts the sharding of a side, for any format, and plans the refit between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from refit.config.quantisation import CODES_DTYPE, Quantisation, scale_key
from refit.config.registry import FORMATS, load
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.cost import Cost, cost_of
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.quantised import UNQUANTISED_SUFFIX, WireShardings, check_kept, quantised_sharding, wire_shardings
from refit.plan.sharding import Sharding
from refit.predict.families.parts import Parts, sharding_in_parts
from refit.predict.training_memory import TrainingMemory


def predict_side(model: ModelShape, side: SideSpec) -> Sharding:
    """The boxes that every rank of `side` holds. Raises UsageError where the model cannot be sharded this way."""
    sharding: Sharding = load(FORMATS[side.format].predict)(model, side)
    return sharding if side.quantisation is None else quantised_sharding(sharding, side.quantisation)


def predict_sides(model: ModelShape, source: SideSpec, destination: SideSpec) -> tuple[Sharding, Sharding]:
    """The shardings of both sides, of equal tensors but for what is quantised. Raises UsageError as `predict_side`."""
    held = sharding_in_parts(predict_side(model, source), parts_of(model, destination))
    return held, predict_side(model, destination)


def parts_of(model: ModelShape, destination: SideSpec) -> Parts:
    """The tensors of a source that the FP8 side `destination` holds in parts; empty for most."""
    parts = FORMATS[destination.format].parts
    found: Parts = load(parts)(model, destination) if parts is not None else {}
    return found


def training_bytes(scenario: Scenario) -> dict[int, TrainingMemory]:
    """What each of the source's ranks needs beside its weights to train; empty where no training step is measured."""
    support = FORMATS[scenario.source.format].steps
    if not scenario.trains("source") or scenario.steps is None or scenario.model is None or support is None:
        return {}
    source = predict_side(scenario.model, scenario.source)
    found: dict[int, TrainingMemory] = load(support.memory)(scenario.model, scenario.source, source, scenario.steps)
    return found


def check_side(model: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where the model cannot be sharded this way. Messages call the side `name`."""
    axes = FORMATS[side.format].axes
    for axis in ("pp", "ep", "etp"):
        size = getattr(side.layout, axis)
        if axis not in axes and size > 1:
            raise UsageError(f"{name}: {side.format} sides have {', '.join(axes)} only, not {axis} {size}")
    load(FORMATS[side.format].check)(model, side, name)
    if side.quantisation is not None:
        sharding = load(FORMATS[side.format].predict)(model, side)
        check_kept(sharding.tensors, side.quantisation, name)
        quantised_sharding(sharding, side.quantisation, name)


def library_notes(model: ModelShape, sides: tuple[SideSpec, SideSpec]) -> tuple[str, ...]:
    """Which versions of libraries the predictions of the source and the destination follow, where it matters."""
    formats = (FORMATS[side.format].note for side in sides)
    notes = [load(note)(model, side) if note is not None else None for note, side in zip(formats, sides, strict=True)]
    named = zip(("source", "destination"), notes, strict=True)
    return tuple(f"{name}: {note}" for name, note in named if note is not None)


@dataclass(frozen=True, slots=True)
class PlannedSides:
    """A refit between two sides. `plan` and `wire` are of what crosses the wire, `cost` counts the sides' own weights.

    `wire` is None where nothing is quantised: the plan is then that of the two sides.
    """

    plan: RefitPlan
    cost: Cost
    wire: WireShardings | None = None

    @property
    def quantising_bytes(self) -> dict[int, int]:
        """Memory for quantising on each rank: codes and scales at a source, what waits to be quantised elsewhere.

        A source keeps what it sends, and what it sends to several ranks once: at most the codes of all that it holds.
        """
        if self.wire is None:
            return {}
        plan, tensors = self.plan, self.wire.tensors
        scales = {scale_key(key) for key in tensors}
        made = np.array(
            [each.tensors[0].dtype == CODES_DTYPE or each.tensors[0].key in scales for each in plan.classes]
        )
        waits = np.array([each.tensors[0].key.endswith(UNQUANTISED_SUFFIX) for each in plan.classes])
        needed = np.zeros(1 + plan.ranks[-1], np.int64)
        # What a later stage passes on was made at a source, and lies in the destination's own memory.
        kept = made[plan.tensor_class] & (plan.stage == 0)
        np.add.at(needed, plan.source[kept], plan.nbytes[kept])
        for rank, nbytes in _made_bytes(self.wire).items():
            needed[rank] = min(needed[rank], nbytes)
        np.add.at(needed, plan.destination[waits[plan.tensor_class]], plan.nbytes[waits[plan.tensor_class]])
        return {rank: int(nbytes) for rank, nbytes in enumerate(needed) if nbytes}


def most_quantising_bytes(
    source: Sharding, destination: Sharding, quantisation: Quantisation
) -> dict[str, Mapping[int, int]]:
    """What quantising needs at most on each rank, by the name of the side: all codes that a source can make.

    Found without a plan. Raises UsageError as `wire_shardings` does.
    """
    wire = wire_shardings(source, destination, quantisation)
    waiting = _bytes_of(wire.destination, lambda key: key.endswith(UNQUANTISED_SUFFIX))
    return {"source": _made_bytes(wire), "destination": waiting}


def _made_bytes(wire: WireShardings) -> Mapping[int, int]:
    """Codes and scales that each source rank holds of what is quantised at the source."""
    scales = {scale_key(key) for key in wire.tensors}
    return _bytes_of(wire.source, lambda key: key in scales or key in wire.tensors)


def _bytes_of(sharding: Sharding, chosen: Callable[[str], bool]) -> Mapping[int, int]:
    held = {key: each for key, each in sharding.by_key.items() if chosen(key)}
    return Sharding(sharding.ranks, sharding.tensors, held).bytes_per_rank


def plan_sides(source: Sharding, destination: Sharding, side: SideSpec, ranks_per_node: int | None) -> PlannedSides:
    """Plan the refit from `source` to `destination`, the sharding of `side`. Raises PlanError as `plan_refit` does."""
    if side.quantisation is None:
        plan = plan_refit(source, destination, ranks_per_node=ranks_per_node)
        return PlannedSides(plan, cost_of(plan))
    wire = wire_shardings(source, destination, side.quantisation)
    plan = plan_refit(wire.source, wire.destination, ranks_per_node=ranks_per_node)
    cost = replace(
        cost_of(plan),
        source_weights_by_rank=dict(source.bytes_per_rank),
        destination_weights_by_rank=dict(destination.bytes_per_rank),
    )
    return PlannedSides(plan, cost, wire)
