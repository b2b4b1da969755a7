"""Builds the sides of a refit on this rank and determines the sharding of every rank."""

from __future__ import annotations

import atexit
import gc
from dataclasses import dataclass, replace

from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.config.registry import FORMATS, load
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import ShardingError
from refit.memory.weights import LocalWeights, shards_in_parts
from refit.models.quantised import QuantisedModel
from refit.models.sharded_model import NotBuilt, ShardedModel
from refit.plan.sharding import Sharding
from refit.predict.families.parts import sharding_in_parts
from refit.predict.sides import parts_of, predict_side


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a refit: its specification, the live model on this rank, and the sharding of all its ranks.

    `weights` are those of the model, None on ranks outside the side.
    """

    spec: SideSpec
    model: ShardedModel
    sharding: Sharding
    weights: LocalWeights | None


def build_side(session: Session, name: str) -> Side:
    """Build the side called `name` and determine its sharding. One that no measurement uses is not built.

    Collective: every rank of the job. Raises ShardingError where the live model's sharding is not the predicted one.
    """
    scenario = session.scenario
    spec = scenario.sides[name]
    if name not in scenario.used_sides:
        return Side(spec, NotBuilt(), Sharding((), {}, {}), None)
    session.enter(f"build {name} model")
    session.start.enter("imports")
    build = load(FORMATS[spec.format].build)
    _keep_imports()
    session.start.enter("build")
    model: ShardedModel = build(scenario, name, spec, session.device)
    session.enter(f"check {name} sharding")
    session.start.enter("check")
    if scenario.model is None:
        return Side(spec, model, _gathered_sharding(session, spec, model.weights), model.weights)
    if spec.quantisation is not None and not FORMATS[spec.format].builds_codes:
        model = QuantisedModel(model, spec.quantisation)
    sharding = predict_side(scenario.model, spec)
    if FORMATS[spec.format].is_transformers:
        sharding = _with_live_dtypes(session, name, sharding, model.weights)
    if model.weights is not None:
        _check_prediction(name, session.rank, sharding, model.weights)
    return Side(spec, model, sharding, model.weights)


def refitted_to(destination: SideSpec, model: ModelShape | None, source: Side) -> Side:
    """`source` as a refit to `destination` takes it: in parts what is quantised part by part, in the same memory."""
    parts = parts_of(model, destination) if model is not None else {}
    if not parts:
        return source
    weights = None if source.weights is None else LocalWeights(shards_in_parts(source.weights, parts))
    return replace(source, sharding=sharding_in_parts(source.sharding, parts), weights=weights)


def rearranged(session: Session, name: str, side: Side) -> Side | None:
    """`side` with its experts placed anew, in the same memory; None for a side that keeps its placement.

    Raises ShardingError where the live model's sharding is not the predicted one.
    """
    spec, shape = side.spec.rearranged, session.scenario.model
    if spec is None or shape is None:
        return None
    session.enter(f"rearrange {name} model")
    build = FORMATS[spec.format].rearrange
    assert build is not None, f"{spec.format} sides keep their placement"
    model: ShardedModel = load(build)(side.model, session.scenario, spec)
    sharding = predict_side(shape, spec)
    if model.weights is not None:
        _check_prediction(name, session.rank, sharding, model.weights)
    return Side(spec, model, sharding, model.weights)


def _keep_imports() -> None:
    """Exempt what the libraries made at import from garbage collection: none of it is garbage, and a full collection
    among a million objects would stop planning, or a refit, for half a second."""
    if gc.get_freeze_count() == 0:
        gc.freeze()
        # Libraries report objects that are left at the end as leaks.
        atexit.register(gc.unfreeze)


def _with_live_dtypes(session: Session, name: str, predicted: Sharding, weights: LocalWeights | None) -> Sharding:
    """`predicted` with the dtypes that the tensors have: a release of transformers may keep other parameters in float32
    than those that the tables were compared with. What differs is said. Collective: every rank of the job.
    """
    shards = weights.rank_sharding.shards if weights is not None else {}
    mine = {
        key: shard.tensor.dtype
        for key, shard in shards.items()
        if key in predicted.tensors and predicted.tensors[key].dtype != shard.tensor.dtype
    }
    others = {key: dtype for held in gather(session.control, mine) for key, dtype in held.items()}
    if not others:
        return predicted
    key, dtype = min(others.items())
    session.say(
        f"# note: {name}: the model holds {len(others)} tensors in another dtype than predicted, {key} in {dtype}, not "
        f"{predicted.tensors[key].dtype}: the plan follows the model"
    )
    held = {key: replace(predicted.tensors[key], dtype=dtype) for key, dtype in others.items()}
    return replace(predicted, tensors={**predicted.tensors, **held})


def _check_prediction(name: str, rank: int, sharding: Sharding, weights: LocalWeights) -> None:
    differences = sharding.of_rank(rank).differences(weights.rank_sharding)
    if differences:
        raise ShardingError(
            f"rank {rank}: the {name} model holds other than predicted in {len(differences)} tensors "
            f"(predicted != live): " + "; ".join(differences[:3])
        )


def _gathered_sharding(session: Session, spec: SideSpec, weights: LocalWeights | None) -> Sharding:
    """Collective: every rank of the job. Ranks outside the side contribute nothing."""
    gathered = gather(session.control, weights.rank_sharding if weights is not None else None)
    return Sharding.from_ranks({rank: held for rank in spec.ranks if (held := gathered[rank]) is not None})
