"""Source and destination on this rank: models built, memory read, and what they hold known for every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.config.layout import Layout
from refit.errors import ShardingError
from refit.models.megatron.build import BuiltModel, build_model
from refit.models.megatron.groups import GroupCache, build_groups
from refit.models.megatron.provider import build_from_provider, load_provider
from refit.models.megatron.sharding import rank_sharding, read_weights
from refit.models.weights import LocalWeights
from refit.plan.sharding import RankSharding, Sharding
from refit.predict.megatron import predict


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the refit. `model` and `memory` are None on ranks outside its window; `sharding` covers all of it."""

    layout: Layout
    model: BuiltModel | None
    memory: LocalWeights | None
    sharding: Sharding


@dataclass(frozen=True, slots=True)
class Sides:
    source: Side
    destination: Side


def build_sides(session: Session) -> Sides:
    """Build both models and establish what every rank holds.

    Collective: every rank of the job. Raises InventoryError where a live model holds other than predicted.
    """
    cache: GroupCache = {}
    scenario = session.scenario
    return Sides(
        _build_side(session, "source", scenario.source, cache),
        _build_side(session, "destination", scenario.destination, cache),
    )


def _build_side(session: Session, name: str, layout: Layout, cache: GroupCache) -> Side:
    session.enter(f"build {name} model")
    model = _builder(session)(layout, build_groups(layout, cache))
    memory = read_weights(model) if model is not None else None
    session.enter(f"check {name} rank sharding")
    shape = session.scenario.model
    if shape is None:
        return Side(layout, model, memory, _gathered_sharding(session, layout, memory))
    sharding = predict(shape, layout, transformer_impl=session.scenario.transformer_impl)
    if memory is not None:
        _check_prediction(name, session.rank, sharding.inventory(session.rank), rank_sharding(memory))
    return Side(layout, model, memory, sharding)


def _builder(session: Session) -> Callable[[Layout, Any], BuiltModel | None]:
    scenario, shape = session.scenario, session.scenario.model
    if shape is not None:
        return lambda layout, groups: build_model(
            shape, layout, groups, device=session.device, transformer_impl=scenario.transformer_impl
        )
    provider = load_provider(scenario.model_provider or "")
    return lambda layout, groups: build_from_provider(provider, layout, groups, session.device)


def _check_prediction(name: str, rank: int, predicted: RankSharding, live: RankSharding) -> None:
    differences = predicted.differences(live)
    if differences:
        raise ShardingError(
            f"rank {rank}: the {name} model holds other than predicted in {len(differences)} tensors "
            f"(predicted != live): " + "; ".join(differences[:3])
        )


def _gathered_sharding(session: Session, layout: Layout, memory: LocalWeights | None) -> Sharding:
    """Collective: every rank of the job, those outside the window contribute nothing."""
    gathered = gather(session.control, rank_sharding(memory) if memory is not None else None)
    return Sharding.from_ranks({rank: held for rank in layout.ranks if (held := gathered[rank]) is not None})
