"""A dry run as JSON, for programs."""

from __future__ import annotations

from dataclasses import dataclass

from refit.config.relay import Relay
from refit.config.scenario import Scenario
from refit.plan.cost import Bound, Cost
from refit.predict.dry_run import Changes, DryRun, WithoutRelay
from refit.results.result import encoded

TRAFFIC = ("sent_within", "sent_between", "received_within", "received_between", "local")
"""Kinds of bytes that a rank moves: within and between nodes, and local copies."""


@dataclass(frozen=True, slots=True)
class TrafficFigures:
    """Bytes of each rank, in rank order."""

    gpus_per_node: int
    """Those of an NVLink domain, which is a node here."""
    sent_within: tuple[int, ...]
    """To ranks of its node."""
    sent_between: tuple[int, ...]
    """To other nodes."""
    received_within: tuple[int, ...]
    """From ranks of its node."""
    received_between: tuple[int, ...]
    """From other nodes."""
    local: tuple[int, ...]
    """Copied within a rank."""


@dataclass(frozen=True, slots=True)
class DryRunFigures:
    """What a dry run found. Scenario, plan and bounds are as in result files."""

    scenario: Scenario
    num_parameters: int
    """Elements, buffers included."""
    num_tensors: int
    num_ranks: int
    num_gpus: int
    gpus_per_node: int
    ranks_per_gpu: int
    """The most ranks that share a GPU."""
    memory_bytes: int
    """Of the fullest GPU, staging included."""
    fits_memory: bool | None
    """None without a cluster's memory."""
    plan: Cost
    bound: Bound | None
    """None without a cluster's speeds."""
    changes: tuple[Changes, ...]
    """Of each share of changed weights."""
    estimate_s: float | None
    """The bound with what relays take to fill and drain; None without a relay."""
    floor: Bound | None
    """The least bound of all plans."""
    relay: Relay
    least_between_bytes: int
    """What crosses nodes in every plan."""
    without_relay: WithoutRelay | None
    """The plan without a relay; None where this is that plan."""
    traffic: TrafficFigures
    predict_s: float
    """Time of stating what ranks hold."""
    plan_s: float
    """Time of planning."""


def dry_run_json(run: DryRun) -> str:
    """The figures as a JSON object: `DryRunFigures`."""
    cluster = run.options.cluster
    limit = cluster.gpu_memory_bytes if cluster else None
    return encoded(
        DryRunFigures(
            scenario=run.scenario,
            num_parameters=run.num_parameters,
            num_tensors=run.num_tensors,
            num_ranks=run.scenario.num_ranks,
            num_gpus=run.num_gpus,
            gpus_per_node=run.options.gpus_per_node,
            ranks_per_gpu=run.gpus.most_ranks,
            memory_bytes=run.memory_bytes,
            fits_memory=None if limit is None else run.memory_bytes <= limit,
            plan=run.cost,
            bound=run.bound,
            changes=run.changes,
            estimate_s=run.estimate_s,
            floor=run.floor,
            relay=run.relay,
            least_between_bytes=run.least_between_bytes,
            without_relay=run.without_relay,
            traffic=_traffic(run),
            predict_s=run.predict_s,
            plan_s=run.plan_s,
        )
    )


def _traffic(run: DryRun) -> TrafficFigures:
    kinds = {name: tuple(getattr(run.traffic, name).tolist()) for name in TRAFFIC}
    return TrafficFigures(run.options.gpus_per_domain, **kinds)
