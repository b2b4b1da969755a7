"""Plans a refit with the relay that a scenario asks for, or with the one that its bounds favour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap
from refit.config.registry import METHODS, method_of_links
from refit.config.relay import Relay
from refit.config.rows import BETWEEN
from refit.errors import UsageError
from refit.plan.box_array import IntArray
from refit.plan.cost import bytes_matrix, lower_bound, split_traffic
from refit.plan.estimate import MessageSize
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import Sharding

LEAST_GAIN = 0.05
"""AUTO takes a relay whose bound is lower by at least this part. What is passed on waits for its messages."""


@dataclass(frozen=True, slots=True)
class Relaying:
    """The relay that is asked for, and the hardware whose bounds AUTO compares, as `lower_bound` takes it.

    Without a cluster's speeds, a rank's links within its node are as many times as fast as its share of the network as
    it has neighbours, as the planner assumes (`find_pieces`).
    """

    relay: Relay = Relay.OFF
    cluster: Cluster | None = None
    gpus: GpuMap | None = None


class NothingToRelay(UsageError):
    """A relay is asked for, and each byte crosses between hosts once already, or not at all."""


DIRECT = Relaying()
"""Nothing is relayed."""


def plan_with_relay(
    source: Sharding, destination: Sharding, ranks_per_node: int | None, relaying: Relaying
) -> tuple[RefitPlan, Relay]:
    """The plan from `source` to `destination`, and its relay: OFF, NODE or ENGINE.

    Raises NothingToRelay where a relay is asked for and there is nothing to relay, PlanError as `plan_refit` does.
    """
    if relaying.relay is not Relay.AUTO:
        return _planned(source, destination, ranks_per_node, relaying.relay), relaying.relay
    best = last = plan_refit(source, destination, ranks_per_node=ranks_per_node)
    chosen, least = Relay.OFF, _seconds(best, ranks_per_node, relaying)
    for relay in (Relay.NODE, Relay.ENGINE) if ranks_per_node is not None else ():
        assert ranks_per_node is not None
        if relay is Relay.ENGINE and not _limited_by_senders(last, ranks_per_node):
            break
        via = relay_stages(source, destination, relay, ranks_per_node)
        if not via:
            continue
        last = plan_refit(source, destination, ranks_per_node=ranks_per_node, via=via)
        seconds = _seconds(last, ranks_per_node, relaying)
        if seconds < (1 - LEAST_GAIN) * least:
            best, chosen, least = last, relay, seconds
    return best, chosen


NETWORK = method_of_links("cuda", BETWEEN)
"""Whose messages an estimate takes where the method is not known yet: the one for GPUs on several hosts."""


def message_size(method: str, staging_bytes: int) -> MessageSize:
    """Of the messages of a method. A rank spends half of its staging on what it sends, and half on what it receives."""
    row = METHODS[method if method in METHODS else NETWORK]
    return MessageSize(row.message_bytes, max(1, staging_bytes // 2 // row.messages_per_pair))


def _limited_by_senders(plan: RefitPlan, ranks_per_node: int) -> bool:
    """Whether some rank sends more between nodes than any receives. ENGINE has the source send less, and no node
    receive less, than NODE."""
    traffic = split_traffic(bytes_matrix(plan), ranks_per_node)
    return bool(np.max(traffic.sent_between) > (1 + LEAST_GAIN) * np.max(traffic.received_between))


def _planned(source: Sharding, destination: Sharding, ranks_per_node: int | None, relay: Relay) -> RefitPlan:
    if relay is Relay.OFF:
        return plan_refit(source, destination, ranks_per_node=ranks_per_node)
    flag = f"--refit-relay {relay.value}"
    num_ranks = 1 + max(*source.ranks, *destination.ranks)
    if ranks_per_node is None or num_ranks <= ranks_per_node:
        raise NothingToRelay(
            f"{flag}: all {num_ranks} ranks are on 1 host, and nothing crosses between hosts: leave it out, or start "
            "the ranks on 2 hosts or more"
        )
    via = relay_stages(source, destination, relay, ranks_per_node)
    if not via:
        places = "ranks of a host that lacks it" if relay is Relay.NODE else "ranks, or hosts, that lack it"
        raise NothingToRelay(
            f"{flag}: none of {len(destination.tensors)} tensors goes to 2 {places} (hosts of {ranks_per_node} ranks): "
            "each byte crosses once already, leave it out"
        )
    return plan_refit(source, destination, ranks_per_node=ranks_per_node, via=via)


def _seconds(plan: RefitPlan, ranks_per_node: int | None, relaying: Relaying) -> float:
    """The bound of `plan`; without the cluster's speeds, one in which the network moves a byte in a second."""
    matrix = bytes_matrix(plan)
    if relaying.cluster is not None:
        bound = lower_bound(matrix, relaying.cluster, relaying.gpus)
        if bound is not None:
            return bound.seconds
    return _relative(matrix, ranks_per_node or len(matrix))


def _relative(matrix: IntArray, ranks_per_node: int) -> float:
    traffic, neighbours = split_traffic(matrix, ranks_per_node), max(1, ranks_per_node - 1)
    between = max(np.max(traffic.sent_between), np.max(traffic.received_between))
    within = max(np.max(traffic.sent_within), np.max(traffic.received_within))
    return float(max(between, within / neighbours))
