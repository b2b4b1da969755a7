"""Predicts the sharding of a side, for any format, and plans the refit between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from refit.config.registry import ENCODINGS, FORMATS, encodings_of, load
from refit.config.relay import Relay
from refit.config.scenario import Scenario, Sending
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.cost import Cost, cost_of
from refit.plan.plan import RefitPlan
from refit.plan.quantised import check_kept, quantised_sharding
from refit.plan.sharding import Sharding
from refit.plan.wire import Forecast, MaxBytes, Wire
from refit.predict.families.parts import Parts, sharding_in_parts
from refit.predict.relays import DIRECT, Relaying, plan_with_relay
from refit.predict.training_memory import TrainingMemory

WEIGHTS = Sending()
"""They are sent as they are."""


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
    """A refit between two sides. `plan` is of what crosses the wire, `cost` counts the sides' own weights.

    `wires` has what each encoding sends, by its name in ENCODINGS, in the order in which a source applies them. It is
    empty where weights are sent as they are: the plan is then that of the two sides. `relay` is how the plan relays.
    """

    plan: RefitPlan
    cost: Cost
    wires: Mapping[str, Wire] = field(default_factory=dict)
    relay: Relay = Relay.OFF

    @property
    def max_bytes(self) -> MaxBytes | None:
        """Of the encoding that packs the messages; None where a message is as long as its weights."""
        return next((wire.max_bytes for wire in self.wires.values() if wire.max_bytes is not None), None)

    @property
    def encoding_needs(self) -> dict[str, Mapping[int, int]]:
        """What encodings need on each rank, beside the models and staging, by what for. Ranks without are left out."""
        needs = {wire.work: wire.memory_bytes(self.plan) for wire in self.wires.values()}
        return {work: held for work, held in needs.items() if held}

    @property
    def forecasts(self) -> list[Forecast]:
        """What is sent by the share of the weights that has changed; empty where that does not count."""
        return [forecast for wire in self.wires.values() for forecast in wire.forecasts(self.plan)]

    @property
    def work_bytes(self) -> Mapping[int, int]:
        """What encodings read and write on each rank beyond copies of what the plan moves. Ranks without are left
        out."""
        summed: Counter[int] = Counter()
        for wire in self.wires.values():
            summed.update(wire.work_bytes(self.plan))
        return dict(summed)


def wires_between(source: Sharding, destination: Sharding, side: SideSpec, sending: Sending) -> dict[str, Wire]:
    """What each encoding sends from `source` to `destination`, the sharding of `side`, by its name, in order.

    `sending` is the scenario's. What it sends is made from what follows from the dtype of `side`, if anything does: a
    delta to an FP8 destination is one of codes and scales. Raises UsageError as the encodings do.
    """
    found: dict[str, Wire] = {}
    for name in encodings_of(side.held_dtype, sending.encoding):
        row = ENCODINGS[name]
        assert row.wire is not None
        options = (sending.options,) if row.has_options else ()
        wire: Wire = load(row.wire)(source, destination, side, *options)
        # One that follows another may only pack its messages: the first finds in the plan the tensors that it makes.
        assert not found or (wire.source.tensors, wire.destination.tensors) == (source.tensors, destination.tensors)
        found[name] = wire
        source, destination = wire.source, wire.destination
    assert sum(wire.max_bytes is not None for wire in found.values()) <= 1, "two encodings pack the same messages"
    return found


def most_encoding_bytes(
    source: Sharding, destination: Sharding, side: SideSpec, sending: Sending
) -> dict[str, Mapping[int, int]]:
    """What the encodings need at most on each rank, by the name of the side. Found without a plan.

    Raises UsageError as `wires_between` does.
    """
    needed: dict[str, Counter[int]] = {"source": Counter(), "destination": Counter()}
    for wire in wires_between(source, destination, side, sending).values():
        for name, held in wire.most_memory_bytes.items():
            needed[name].update(held)
    return {name: dict(held) for name, held in needed.items()}


def plan_sides(
    source: Sharding,
    destination: Sharding,
    side: SideSpec,
    ranks_per_node: int | None,
    sending: Sending = WEIGHTS,
    relaying: Relaying = DIRECT,
) -> PlannedSides:
    """Plan the refit from `source` to `destination`, the sharding of `side`.

    Raises PlanError as `plan_refit` does, and UsageError where there is nothing to relay.
    """
    wires = wires_between(source, destination, side, sending)
    last = list(wires.values())[-1] if wires else None
    sent = (last.source, last.destination) if last is not None else (source, destination)
    plan, relay = plan_with_relay(*sent, ranks_per_node, relaying)
    cost = cost_of(plan)
    if last is not None:
        cost = replace(
            cost,
            source_weights_by_rank=dict(source.bytes_per_rank),
            destination_weights_by_rank=dict(destination.bytes_per_rank),
        )
    return PlannedSides(plan, cost, wires, relay)
