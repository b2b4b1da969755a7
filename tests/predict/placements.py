"""Random placements of experts."""

from __future__ import annotations

from hypothesis import strategies as st

from refit.config.placement import ExpertPlacement


@st.composite
def placements(draw: st.DrawFn, num_experts: int, num_layers: int, ep: int) -> ExpertPlacement:
    """A map of every layer: each expert somewhere, redundant copies on other ranks, slots in any order."""
    per_rank = draw(st.integers(-(-num_experts // ep), num_experts))
    return ExpertPlacement("map.json", tuple(_row(draw, num_experts, ep, per_rank) for _ in range(num_layers)))


def _row(draw: st.DrawFn, num_experts: int, ep: int, per_rank: int) -> tuple[int, ...]:
    ranks: list[list[int]] = [[] for _ in range(ep)]
    for number, expert in enumerate(draw(st.permutations(range(num_experts)))):
        ranks[number % ep].append(expert)
    for held in ranks:
        others = [expert for expert in draw(st.permutations(range(num_experts))) if expert not in held]
        held += others[: per_rank - len(held)]
    return tuple(expert for held in ranks for expert in draw(st.permutations(held)))
