"""Whether enough ranks have been started for a scenario, asked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping

from refit.config import Mode, Scenario
from refit.errors import UsageError
from refit.layout import Layout


def check_launch(scenario: Scenario, environ: Mapping[str, str], gpus_per_node: int) -> None:
    """Raise UsageError unless torchrun has started enough ranks, going by the variables it sets."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return check_num_ranks(scenario, int(environ["WORLD_SIZE"]))
    needed = scenario.num_ranks
    nodes = math.ceil(needed / gpus_per_node)
    per_node = f"--nnodes {nodes} --nproc-per-node {gpus_per_node}" if nodes > 1 else f"--nproc-per-node {needed}"
    raise UsageError(
        f"no ranks have been started, {needed} are needed: "
        f"torchrun {per_node} benchmark_refit.py <the same flags>, or add --dry-run to plan without them"
    )


def check_num_ranks(scenario: Scenario, available: int) -> None:
    """Raise UsageError, with the sum spelled out and what to lower, where `available` ranks are too few."""
    needed = scenario.num_ranks
    if needed <= available:
        return
    raise UsageError(
        f"{needed_text(scenario)} GPUs needed > {available} available: "
        f"lower {' or '.join(_to_lower(scenario, available))}, or start {needed} ranks"
    )


def needed_text(scenario: Scenario) -> str:
    """`8 + 4 = 12`, in collocated mode `max(8, 4) = 8`."""
    source, destination = scenario.source.world_size, scenario.destination.world_size
    total = f"max({source}, {destination})" if scenario.mode is Mode.COLLOCATED else f"{source} + {destination}"
    return f"{total} = {scenario.num_ranks}"


def _to_lower(scenario: Scenario, available: int) -> list[str]:
    """The flags of the sides that are too large, those that are above 1."""
    sides = [
        (scenario.source, "", "--source-world-size"),
        (scenario.destination, "rl-inference-", "--destination-world-size"),
    ]
    if scenario.mode is Mode.COLLOCATED:
        sides = [side for side in sides if side[0].world_size > available]
    return [flag for layout, prefix, world_flag in sides for flag in _flags_of(layout, prefix, world_flag)]


def _flags_of(layout: Layout, prefix: str, world_flag: str) -> list[str]:
    if layout.world_size != layout.tp * layout.ep * layout.pp:
        return [world_flag]
    sizes = (("tensor", layout.tp), ("pipeline", layout.pp), ("expert", layout.ep))
    return [f"--{prefix}{axis}-model-parallel-size" for axis, size in sizes if size > 1]
