"""The planner: from two shardings to a RefitPlan.

1. Match the tensors of both sides by key (`match_tensors`), and plan those of one geometry, such as the layers of a
   model, as one tensor with an added dim (`tensor_classes`).
2. Cover every box of every destination rank with boxes that the source holds, each with the ranks that may send it: the
   destination itself, else replicas on its node, else all (`find_pieces`).
3. Share out the pieces that several ranks may send, so that the senders end even (`choose_senders`).

RefitPlan then proves that the routes found are complete (`proof`). The cost follows ranks and geometries, not layers.
Pure and deterministic: all ranks compute the same plan from the same shardings, without communication.
"""

from __future__ import annotations

from refit.errors import PlanError
from refit.plan.pieces import find_pieces
from refit.plan.plan import RefitPlan
from refit.plan.senders import choose_senders
from refit.plan.sharding import Sharding
from refit.plan.tensor_class import tensor_classes


def plan_refit(source: Sharding, destination: Sharding, *, ranks_per_node: int | None = None) -> RefitPlan:
    """Plan how every box of `destination` is filled from `source`.

    With `ranks_per_node`, replicas on the destination's node are preferred to remote ones.
    Raises PlanError where the sides do not hold the same tensors, or an element has no source.
    """
    match_tensors(source, destination)
    classes = tensor_classes(source, destination)
    pieces = find_pieces(classes, ranks_per_node)
    routes = choose_senders(pieces, classes, source.ranks, destination.ranks)
    return RefitPlan(
        source_sharding=source,
        destination_sharding=destination,
        classes=classes,
        tensor_class=pieces.tensor_class[routes.piece],
        source=routes.source,
        destination=pieces.destination[routes.piece],
        boxes=routes.boxes,
    )


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
