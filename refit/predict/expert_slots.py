"""Which expert is in which slot of which rank of an engine, layer by layer, checked against the model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from refit.config.placement import ExpertPlacement
from refit.config.shape import Experts
from refit.errors import UsageError

Slots = tuple[tuple[int, ...], ...]
"""The experts of one layer by the rank that holds them, in the order of their slots."""


def placed_layers(experts: Experts, placement: ExpertPlacement, num_redundant: int | None, ep: int) -> dict[int, Slots]:
    """The slots of every layer with experts, on `ep` ranks. Layers of equal placement share one object.

    Slot `p` of all lives on rank `p // (slots / ep)`; without redundant experts, vLLM's strategies take experts that
    do not divide by `ep` too. Raises UsageError, with the place, where a placement is none of this model's.
    """
    layers = [layer for layer, routed in enumerate(experts.layers) if routed]
    if ep == 1 and (placement != ExpertPlacement() or num_redundant):
        what = f"{num_redundant} redundant experts" if num_redundant else f"placement {placement.name}"
        raise UsageError(f"{what} on EP size 1, where every rank has all experts: raise EP")
    if not placement.is_file:
        return dict.fromkeys(layers, _by_strategy(experts.num_experts, placement.name, num_redundant or 0, ep))
    rows = _rows_of_layers(placement, layers, len(experts.layers))
    width = len(placement.rows[0])
    wanted = experts.num_experts + (num_redundant if num_redundant is not None else width - experts.num_experts)
    if width != wanted or width < experts.num_experts:
        asked = f" and {num_redundant} redundant ones" if num_redundant else ""
        raise UsageError(
            f"{placement.name} has {width} slots per layer for {experts.num_experts} experts{asked}: give "
            f"--rl-inference-num-redundant-experts {max(width - experts.num_experts, 0)}, or a map of "
            f"{max(wanted, experts.num_experts)} slots"
        )
    if width % ep:
        raise UsageError(
            f"{placement.name} has {width} slots per layer, which EP size {ep} does not divide: give "
            f"{-(-width // ep) * ep} slots"
        )
    shared: dict[tuple[int, ...], Slots] = {}
    for layer, row in rows.items():
        if row not in shared:
            slots = _cut(row, ep)
            _check(slots, experts.num_experts, f"{placement.name}, layer {layer}")
            shared[row] = slots
    return {layer: shared[row] for layer, row in rows.items()}


def _rows_of_layers(placement: ExpertPlacement, layers: Sequence[int], num_layers: int) -> dict[int, tuple[int, ...]]:
    """The file's row of each layer: vLLM prints one per layer with experts, SGLang one per decoder layer."""
    if len(placement.rows) == len(layers):
        return dict(zip(layers, placement.rows, strict=True))
    if len(placement.rows) == num_layers:
        return {layer: placement.rows[layer] for layer in layers}
    raise UsageError(
        f"{placement.name} has rows for {len(placement.rows)} layers, the model has {len(layers)} with experts of "
        f"{num_layers}: give {len(layers)} rows, or {num_layers}"
    )


def _by_strategy(num_experts: int, strategy: str, num_redundant: int, ep: int) -> Slots:
    """vLLM's placements: `determine_expert_map` (layers/fused_moe), and with redundant experts
    `EplbState.build_initial_global_physical_to_logical_map` (distributed/eplb/eplb_state.py)."""
    if num_experts + num_redundant < ep:
        raise UsageError(
            f"EP size {ep} leaves ranks without any of {num_experts + num_redundant} experts: lower TP x DP, or give "
            f"--rl-inference-num-redundant-experts {ep - num_experts}"
        )
    if num_redundant:
        if strategy != "linear":
            raise UsageError(
                f"{num_redundant} redundant experts with placement {strategy}: vLLM would place them linear, give "
                "linear or a file"
            )
        if (num_experts + num_redundant) % ep:
            raise UsageError(
                f"{num_experts} experts + {num_redundant} redundant ones = {num_experts + num_redundant} cannot be "
                f"divided by EP size {ep}: give {-(-(num_experts + num_redundant) // ep) * ep - num_experts}"
            )
        slots = _cut([*range(num_experts), *(copy % num_experts for copy in range(num_redundant))], ep)
        _check(slots, num_experts, f"{num_redundant} redundant experts")
        return slots
    if strategy == "round_robin":
        return tuple(tuple(range(rank, num_experts, ep)) for rank in range(ep))
    size, rest = divmod(num_experts, ep)
    starts = [rank * size + min(rank, rest) for rank in range(ep + 1)]
    return tuple(tuple(range(first, end)) for first, end in itertools.pairwise(starts))


def _cut(row: Sequence[int], ep: int) -> Slots:
    size = len(row) // ep
    return tuple(tuple(row[rank * size : (rank + 1) * size]) for rank in range(ep))


def _check(slots: Slots, num_experts: int, place: str) -> None:
    """Raise UsageError for an expert that does not exist, that no rank has, or that one rank has twice.

    A second copy on the same rank serves nobody: it takes memory and no load off another rank.
    """
    known = range(num_experts)
    for rank, held in enumerate(slots):
        begin = rank * len(held)
        for number, expert in enumerate(held):
            if expert not in known:
                raise UsageError(
                    f"{place}, slot {begin + number}: there is no expert {expert}, the model has {num_experts} "
                    f"(0 to {num_experts - 1})"
                )
        expert, count = Counter(held).most_common(1)[0] if held else (0, 1)
        if count > 1:
            first = held.index(expert)
            second = held.index(expert, first + 1)
            raise UsageError(
                f"{place}: expert {expert} is in slots {begin + first} and {begin + second}, both of EP rank {rank}, "
                "where a second copy takes no load off any other rank: move one of them"
            )
    missing = sorted(set(known) - {expert for held in slots for expert in held})
    if missing:
        raise UsageError(
            f"{place}: {len(missing)} of {num_experts} experts are in no slot, the first is expert {missing[0]}: "
            "give each a slot"
        )
