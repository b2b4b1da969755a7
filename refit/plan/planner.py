"""The planner: from two shardings to a RefitPlan.

1. Match the tensors of both sides by key (`match_tensors`), and plan those of one geometry, such as the layers of a
   model, as one tensor with an added dim (`tensor_classes`).
2. Cover every box of every destination rank with boxes that the source holds, each with the ranks that may send it: the
   destination itself, else replicas on its node, else all (`find_pieces`).
3. Share out the pieces that several ranks may send, so that the senders end even (`choose_senders`).

A plan of several stages repeats 2 and 3 for each, with the sharding that the stage before has delivered as its source.

RefitPlan then proves that the routes found are complete (`proof`). The cost follows ranks and geometries, not layers.
Pure and deterministic: all ranks compute the same plan from the same shardings, without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refit.errors import PlanError
from refit.plan.box_array import Column, RepeatedBoxes
from refit.plan.pieces import find_pieces
from refit.plan.plan import RefitPlan
from refit.plan.senders import choose_senders
from refit.plan.sharding import Sharding
from refit.plan.tensor_class import TensorClass, tensor_classes


def plan_refit(
    source: Sharding, destination: Sharding, *, ranks_per_node: int | None = None, via: Sequence[Sharding] = ()
) -> RefitPlan:
    """Plan how every box of `destination` is filled from `source`.

    With `ranks_per_node`, replicas on the destination's node are preferred to remote ones. `via` are what is delivered
    after each stage but the last: `destination` restricted to some of its holders, or to parts of its boxes, each with
    all that the one before it has (`refit.plan.relay` makes one). Without it there is one stage.
    Raises PlanError where the sides do not hold the same tensors, an element has no source, or `via` is not as said.
    """
    match_tensors(source, destination)
    shardings = (source, *via, destination)
    for sharding in via:
        if sharding.tensors != destination.tensors or not set(sharding.ranks) <= set(destination.ranks):
            raise PlanError("a stage delivers other tensors, or to other ranks, than the destination's")
    classes = tensor_classes(shardings)
    stages = [_stage(classes, shardings, number, ranks_per_node) for number in range(len(shardings) - 1)]
    return RefitPlan(
        shardings=shardings,
        classes=classes,
        stage=np.repeat(np.arange(len(stages), dtype=np.int8), [len(each.source) for each in stages]),
        tensor_class=np.concatenate([each.tensor_class for each in stages]),
        source=np.concatenate([each.source for each in stages]),
        destination=np.concatenate([each.destination for each in stages]),
        boxes=RepeatedBoxes.concatenated([each.boxes for each in stages]),
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    """The routes of one stage: columns of RefitPlan."""

    tensor_class: Column
    source: Column
    destination: Column
    boxes: RepeatedBoxes


def _stage(
    classes: Sequence[TensorClass], shardings: Sequence[Sharding], number: int, ranks_per_node: int | None
) -> _Stage:
    classes = [each.of_stage(number) for each in classes]
    pieces = find_pieces(classes, ranks_per_node)
    routes = choose_senders(pieces, classes, shardings[number].ranks, shardings[number + 1].ranks)
    destination = pieces.destination[routes.piece]
    tensor_class = pieces.tensor_class[routes.piece]
    if number == 0:
        return _Stage(tensor_class, routes.source, destination, routes.boxes)
    # From stage 1 on, what a rank would copy to itself is where it belongs: an earlier stage has written it there.
    moves = routes.source != destination
    return _Stage(tensor_class[moves], routes.source[moves], destination[moves], routes.boxes[moves])


def match_tensors(source: Sharding, destination: Sharding) -> None:
    """Check that both sides hold the same tensors with the same shapes.

    Dim 0 of a padded tensor (vocabulary) may differ. Raises PlanError, also for source tensors without a destination:
    subset refits are not supported.
    """
    missing = sorted(destination.tensors.keys() - source.tensors.keys())
    surplus = sorted(source.tensors.keys() - destination.tensors.keys())
    if missing or surplus:
        raise PlanError(
            f"the two models differ: {len(missing)} tensors only at the destination {missing[:3]}, "
            f"{len(surplus)} only at the source {surplus[:3]}"
        )
    for key, wanted in destination.tensors.items():
        held = source.tensors[key]
        free = 1 if wanted.padded and held.padded else 0
        if len(held.shape) != len(wanted.shape) or held.shape[free:] != wanted.shape[free:]:
            raise PlanError(f"{key}: shape {list(held.shape)} at the source, {list(wanted.shape)} at the destination")
