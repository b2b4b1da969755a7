"""The lower bound of a plan, as text."""

from __future__ import annotations

from refit import units
from refit.config.clusters import Cluster
from refit.plan.cost import Bound


def bound_text(bound: Bound | None, cluster: Cluster) -> str:
    """`37.7 ms on h200_nvlink: rank 4 receives ...`; where `bound` is None, why there is none."""
    if bound is None:
        return (
            f"none: {cluster.name} has no speed between nodes (inter_node_gb_per_s) and bytes cross "
            f"nodes of {cluster.gpus_per_node} GPUs"
        )
    return f"{units.seconds(bound.seconds)} on {cluster.name}: {bound.limited_by}"


def estimate_text(seconds: float) -> str:
    """`1.91 s with the filling of the pipeline`."""
    return f"{units.seconds(seconds)}, the bound and what relays take to fill and drain"


def floor_text(floor: Bound) -> str:
    """`1.33 s: node 8 receives 530.8 GB at 400 GB/s`."""
    return f"{units.seconds(floor.seconds)}: {floor.limited_by}"
