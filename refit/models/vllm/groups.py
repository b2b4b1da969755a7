"""The process groups of an engine's reference forward pass, on any consecutive ranks of the job."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from refit.models.process_groups import own_group
from refit.predict.vllm.engine import Engine, Place


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place, its groups and its neighbours in the pipeline.

    `tp` has the ranks that share the dense weights of a stage, `experts` all ranks of a stage. `previous` and `next`
    are global ranks, None at the ends.
    """

    place: Place
    tp: dist.ProcessGroup
    experts: dist.ProcessGroup
    previous: int | None
    next: int | None


def build_groups(engine: Engine, ranks: range) -> Groups | None:
    """The groups of this rank; None outside `ranks`. Collective: every rank of the default group, with the same sides.

    Gloo and NCCL both carry the collectives: the groups have the default group's backends.
    """
    by_tp: dict[tuple[int, int, int], list[int]] = {}
    by_stage: dict[tuple[int, int], list[int]] = {}
    by_place: dict[tuple[int, Place], int] = {}
    for local, rank in enumerate(ranks):
        number, place = local // engine.num_ranks, engine.place(local)
        by_tp.setdefault((number, place.stage, place.dp), []).append(rank)
        by_stage.setdefault((number, place.stage), []).append(rank)
        by_place[number, place] = rank
    tp, experts = (own_group(list(lines.values())) for lines in (by_tp, by_stage))
    rank = dist.get_rank()
    if rank not in ranks:
        return None
    assert tp is not None
    assert experts is not None
    number, place = next(where for where, other in by_place.items() if other == rank)
    neighbours = (Place(place.stage + step, place.dp, place.tp, place.expert) for step in (-1, 1))
    previous, following = (by_place.get((number, other)) for other in neighbours)
    return Groups(place, tp, experts, previous, following)
