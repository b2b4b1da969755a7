"""The rank map: which ranks are source, destination and idle."""

from __future__ import annotations

from refit.config.scenario import Scenario


def rank_map(scenario: Scenario, world_size: int) -> str:
    """Three lines, and a fourth where ranks are idle, for a job of `world_size` ranks."""
    used = scenario.num_ranks
    lines = [
        f"World size: {world_size} (using {used} {_what(scenario)})",
        f"Source ranks: {_span(scenario.source.ranks)} ({scenario.source.summary})",
    ]
    if "destination" in scenario.used_sides:
        destination = scenario.destination
        lines.append(f"Destination ranks: {_span(destination.ranks)} ({destination.summary})")
    if used < world_size:
        lines.append(f"Idle ranks: {_span(range(used, world_size))} (not participating)")
    return "\n".join(lines)


def _what(scenario: Scenario) -> str:
    return "GPUs" if scenario.ranks_per_gpu == 1 else f"ranks, up to {scenario.ranks_per_gpu} per GPU"


def _span(ranks: range) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
