"""Bytes between every pair of ranks. Result files do not hold them, so they are planned again from the flags."""

from __future__ import annotations

from refit.cli.parsing import parse
from refit.errors import RefitError
from refit.plan.box_array import IntArray
from refit.plan.cost import bytes_matrix
from refit.predict.relays import Relaying
from refit.predict.sides import plan_sides, predict_sides
from refit.report.plots.pairs import NoPairs
from refit.results.outcomes import Outcome


def pair_bytes(outcome: Outcome, gpus_per_node: int) -> IntArray:
    """Bytes from each rank (row) to each rank (column), `[num_ranks, num_ranks]`, local copies on the diagonal.

    Raises NoPairs where flags cannot be planned here, or where the plan is not the one that ran (another version's).
    """
    planned, digest = outcome.planned, outcome.refit.plan.digest if outcome.refit.plan else ""
    try:
        scenario = parse([*planned.flags, "--dry-run"]).scenario
        if scenario.model is None:
            raise NoPairs("a --model-provider's model cannot be predicted")
        source, destination = predict_sides(scenario.model, scenario.source, scenario.destination)
        # A run on one node plans without nodes, and a cluster's NVLink domain may be larger than a host.
        domain = (scenario.cluster.gpus_per_node if scenario.cluster else gpus_per_node) * scenario.ranks_per_gpu
        # The speeds that `auto` compares are those of the run's own cluster; which GPUs are shared follows the nodes.
        relaying = Relaying(scenario.relay, scenario.cluster)
        for ranks_per_node in dict.fromkeys((domain, planned.ranks_per_node, None)):
            sides = (source, destination, scenario.destination)
            plan = plan_sides(*sides, ranks_per_node, scenario.sending, relaying).plan
            if digest in ("", plan.digest):
                return bytes_matrix(plan)
    except RefitError as error:
        raise NoPairs(f"its flags cannot be planned: {error}") from None
    raise NoPairs("planned here it differs from the plan that ran, which another version of this suite made")
