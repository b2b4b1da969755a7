"""The dry run: predict both sides, plan, sum up. It needs no GPU, no Megatron and no second process."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap, planned_gpus
from refit.config.relay import Relay
from refit.config.scenario import Mode, Scenario, Sending, Verify, check_num_ranks, num_nodes
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box_array import IntArray
from refit.plan.cost import Bound, Cost, Traffic, bytes_matrix, lower_bound, split_traffic
from refit.plan.estimate import MessageSize, estimate_s, filling_s
from refit.plan.floor import LeastBytes, floor_of, least_bytes
from refit.plan.planner import plan_refit
from refit.predict.expert_map import ExpertMap, expert_maps
from refit.predict.findings import Crossing
from refit.predict.relays import Relaying, message_size
from refit.predict.sides import check_side, plan_sides, predict_sides, training_bytes
from refit.predict.training_memory import TrainingMemory


@dataclass(frozen=True, slots=True)
class DryRunOptions:
    """The hardware that a dry run assumes. `num_gpus` None stands for as many as the scenario needs.

    The plan uses hosts of `gpus_per_node` GPUs, as a run does. Traffic and bound use the cluster's NVLink domains.
    `compared` are clusters whose floors are wanted beside. `alone`: the same scenario with other destinations is not.
    """

    num_gpus: int | None = None
    gpus_per_node: int = 8
    cluster: Cluster | None = None
    compared: tuple[Cluster, ...] = ()
    alone: bool = False

    @property
    def gpus_per_domain(self) -> int:
        """GPUs of one NVLink domain: the cluster's, or those of a host."""
        return self.cluster.gpus_per_node if self.cluster else self.gpus_per_node

    def check_num_gpus(self, scenario: Scenario) -> None:
        """Raise UsageError where `scenario` needs more GPUs, with the flags that ask for as many."""
        shared = scenario.ranks_per_gpu
        if self.num_gpus is None:
            return
        gpus = math.ceil(scenario.num_ranks / shared)
        nodes = num_nodes(gpus, self.gpus_per_node)
        more = f"ask for {nodes} nodes of {self.gpus_per_node} (--nodes {nodes}; of a dry run --num-gpus {gpus})"
        check_num_ranks(scenario, self.num_gpus * shared, more if nodes > 1 else f"give --num-gpus {gpus}")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a refit sends where `share` of the weights has changed, at most, and its bound."""

    share: float
    wire_bytes: int
    bound: Bound | None


@dataclass(frozen=True, slots=True)
class WithoutRelay:
    """Bytes between and within nodes of the plan that relays nothing, and its lower bound."""

    between_bytes: int
    within_bytes: int
    bound: Bound | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """The figures of a scenario. `source_bytes` and `destination_bytes` are each rank's weights of that side.
    `encoding_needs` are the bytes that encodings need on ranks, by what for: `quantising`.

    `gpus` says which ranks share a GPU. `matrix` has the bytes from each rank (row) to each rank (column), `traffic`
    splits them at the boundaries of nodes, `work_bytes` are those that encodings read and write on ranks beside them.
    `changes` has a row for each share of changed weights that is asked for; the other bytes are those of a refit that
    sends everything. `bound` is None without a cluster, and where the cluster has no speed for bytes that cross its
    nodes, and so is `floor`, the least bound of all plans; `floors` has it on each cluster of the options.
    `estimate_s` is the bound with the time in which relays fill and drain; None where there is no bound, or no relay.
    `least_between_bytes` cross nodes in every plan. `relay` is off, node or engine; `without_relay` has the figures of
    the plan without one, None where this is that plan.
    `training` is what the source's ranks need beside their weights to train; empty where no training step is measured.
    `expert_maps` are the destination's, empty for a format that does not let users place experts. `linear` is the same
    scenario with experts in order and none twice, `rearranged` with those of the next placement; both None where they
    are not another. `unquantised` is that with the destination in the source's dtype, None where it is. `wires` are
    what the encodings send, by their names.
    """

    scenario: Scenario
    model: ModelShape
    options: DryRunOptions
    num_gpus: int
    gpus: GpuMap
    num_parameters: int
    num_tensors: int
    source_bytes: dict[int, int]
    destination_bytes: dict[int, int]
    encoding_needs: dict[str, Mapping[int, int]]
    cost: Cost
    matrix: IntArray
    work_bytes: Mapping[int, int]
    traffic: Traffic
    bound: Bound | None
    changes: tuple[Changes, ...]
    relay: Relay
    least_between_bytes: int
    estimate_s: float | None
    floor: Bound | None
    floors: Mapping[Cluster, Bound | None]
    without_relay: WithoutRelay | None
    training: Mapping[int, TrainingMemory]
    predict_s: float
    plan_s: float
    expert_maps: tuple[ExpertMap, ...] = ()
    linear: DryRun | None = None
    rearranged: DryRun | None = None
    unquantised: DryRun | None = None
    wires: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """Bytes on the fullest GPU: what it holds of both sides where they share it, and the staging limit."""
        return max(max(held.values()) for held in self.held_bytes.values()) + self.staging_bytes

    @property
    def staging_bytes(self) -> int:
        """The staging limit of a GPU: of all programs of all its ranks."""
        return self.scenario.staging_bytes * self.num_programs

    @property
    def num_programs(self) -> int:
        """Programs of a GPU's ranks that stage at a time. Refits of what steps change are compared with full ones."""
        is_compared = self.scenario.sends_steps and self.scenario.verify is not Verify.OFF
        return self.gpus.most_ranks * (2 if is_compared else 1)

    @property
    def encoding_bytes(self) -> dict[int, int]:
        """What encodings need on each rank; ranks without are left out."""
        needed: Counter[int] = Counter()
        for held in self.encoding_needs.values():
            needed.update(held)
        return dict(needed)

    @property
    def held_bytes(self) -> dict[str, Mapping[int, int]]:
        """Bytes on each GPU, of `source` and `destination`, or of `both` where they share GPUs.

        They are weights, what encodings need and, on a side that trains, what training needs. Without ranks that
        share a GPU, a GPU has its rank's number.
        """
        held = self.held_by_rank
        return held if not self.gpus.is_shared else {"both": held_on(self.gpus, held)}

    @property
    def held_by_rank(self) -> dict[str, Mapping[int, int]]:
        """The same on each rank."""
        extra = self.encoding_bytes
        training = {rank: needed.total_bytes for rank, needed in self.training.items()}
        source = {rank: held + training.get(rank, 0) + extra.get(rank, 0) for rank, held in self.source_bytes.items()}
        if self.scenario.mode is Mode.NON_COLLOCATED or not self.destination_bytes:
            destination = {rank: nbytes + extra.get(rank, 0) for rank, nbytes in self.destination_bytes.items()}
            held: dict[str, Mapping[int, int]] = {"source": source, "destination": destination}
            return {name: held[name] for name in self.scenario.used_sides}
        # A rank's extra bytes are already counted once, with its source's.
        extra = {rank: nbytes for rank, nbytes in extra.items() if rank not in source}
        sides = (source, self.destination_bytes, extra)
        return {"both": {rank: sum(side.get(rank, 0) for side in sides) for rank in range(self.scenario.num_ranks)}}

    @property
    def crossing(self) -> Crossing | None:
        """Bytes between nodes and within them; None where all ranks are in one."""
        traffic, direct = self.traffic, self.without_relay
        if self.scenario.num_ranks <= traffic.ranks_per_node:
            return None
        between = int(traffic.sent_between.sum())
        return Crossing(
            relay=self.relay,
            between_bytes=between,
            within_bytes=int(traffic.sent_within.sum()),
            least_bytes=self.least_between_bytes,
            direct_bytes=between if direct is None else direct.between_bytes,
        )

    def held_text(self, side: str) -> str:
        """What `held_bytes` of `side` are: `weights`, `weights, quantising and training`."""
        what = ["weights"]
        for work, needed in self.encoding_needs.items():
            if any(rank in needed for rank in self.held_by_rank.get(side, needed)):
                what.append(work)
        if self.training and side != "destination":
            what.append("training")
        return " and ".join(part for part in (", ".join(what[:-1]), what[-1]) if part)


def dry_run(scenario: Scenario, options: DryRunOptions) -> DryRun:
    """Plan `scenario` on predicted rank shardings. Raises UsageError where there are too few GPUs."""
    if scenario.model is None:
        raise UsageError("--dry-run predicts the models that flags describe: a --model-provider has to be run")
    shared = scenario.ranks_per_gpu
    options.check_num_gpus(scenario)
    gpus = planned_gpus(scenario.num_ranks, options.gpus_per_node, shared)
    ranks_per_node = options.gpus_per_node * shared
    cluster, per_domain = options.cluster, options.gpus_per_domain * shared
    relaying = Relaying(scenario.relay if "refit" in scenario.measurements else Relay.OFF, cluster, gpus)
    clusters = (*options.compared, *((cluster,) if cluster else ()))
    domains = frozenset({per_domain, *(each.gpus_per_node * shared for each in clusters)})
    relays = relaying.relay is not Relay.OFF
    messages = message_size(scenario.method, scenario.staging_bytes) if relays else None
    hardware = _Hardware(ranks_per_node, domains, relaying, messages)
    figures = _planned(scenario.model, scenario.source, scenario.destination, hardware, scenario.sending)
    floors = {
        each: floor_of(figures.least[each.gpus_per_node * shared], each, each.gpus_per_node * shared, gpus)
        for each in clusters
    }
    bound = lower_bound(figures.matrix, cluster, gpus, figures.work_bytes) if cluster else None
    return DryRun(
        scenario=scenario,
        model=scenario.model,
        options=options,
        num_gpus=options.num_gpus or math.ceil(scenario.num_ranks / shared),
        gpus=gpus,
        num_parameters=figures.num_parameters,
        num_tensors=figures.num_tensors,
        source_bytes=figures.source_bytes if "source" in scenario.used_sides else {},
        destination_bytes=figures.destination_bytes if "destination" in scenario.used_sides else {},
        encoding_needs=figures.encoding_needs,
        cost=figures.cost,
        matrix=figures.matrix,
        work_bytes=figures.work_bytes,
        traffic=split_traffic(figures.matrix, per_domain),
        bound=bound,
        estimate_s=estimate_s(bound, figures.filling_s) if figures.filling_s else None,
        relay=figures.relay,
        least_between_bytes=figures.least[per_domain].between,
        floor=floors[cluster] if cluster else None,
        floors=floors,
        without_relay=_without_relay(figures, per_domain, cluster, gpus),
        changes=tuple(_changes(share, matrix, work, cluster, gpus) for share, matrix, work in figures.changes),
        training=training_bytes(scenario),
        predict_s=figures.predict_s,
        plan_s=figures.plan_s,
        expert_maps=figures.expert_maps,
        linear=_with_destination(scenario, _linear(scenario.model, scenario.destination), options),
        rearranged=_with_destination(scenario, scenario.destination.rearranged, options),
        unquantised=_with_destination(scenario, _unquantised(scenario), options),
        wires=figures.wires,
    )


def _changes(share: float, matrix: IntArray, work: Mapping[int, int], cluster: Cluster | None, gpus: GpuMap) -> Changes:
    bound = lower_bound(matrix, cluster, gpus, work) if cluster else None
    return Changes(share, int(matrix.sum() - matrix.trace()), bound)


def held_on(gpus: GpuMap, held: Mapping[str, Mapping[int, int]]) -> dict[int, int]:
    """Bytes on each GPU: those of all its ranks, of every side in `held`."""
    summed: dict[int, int] = {}
    for of_rank in held.values():
        for rank, nbytes in of_rank.items():
            summed[gpus.gpu_of(rank)] = summed.get(gpus.gpu_of(rank), 0) + nbytes
    return summed


@dataclass(frozen=True, slots=True)
class _Figures:
    """What a dry run finds for two sides, whatever moves the bytes. Fields are those of DryRun; `changes` has a share,
    its `bytes_matrix` and what encodings then read and write on ranks, `least` what every plan moves, by ranks of a
    node."""

    num_parameters: int
    num_tensors: int
    source_bytes: dict[int, int]
    destination_bytes: dict[int, int]
    encoding_needs: dict[str, Mapping[int, int]]
    cost: Cost
    matrix: IntArray
    relay: Relay
    least: Mapping[int, LeastBytes]
    direct: IntArray | None
    filling_s: float
    work_bytes: Mapping[int, int]
    changes: tuple[tuple[float, IntArray, Mapping[int, int]], ...]
    predict_s: float
    plan_s: float
    expert_maps: tuple[ExpertMap, ...]
    wires: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Hardware:
    """What a plan depends on: ranks of a host, of the NVLink domains that are asked about, and what `auto` compares."""

    ranks_per_node: int
    ranks_per_domain: frozenset[int]
    relaying: Relaying
    messages: MessageSize | None


@functools.lru_cache(maxsize=1)  # sweeps plan scenarios of equal sides one after another; a large plan takes memory
def _planned(
    model: ModelShape, source: SideSpec, destination: SideSpec, hardware: _Hardware, sending: Sending
) -> _Figures:
    start_s = time.perf_counter()
    shardings = predict_sides(model, source, destination)
    predicted_s = time.perf_counter()
    per_node = hardware.ranks_per_node
    planned = plan_sides(*shardings, destination, per_node, sending, hardware.relaying)
    matrix, (sent, *_, received) = bytes_matrix(planned.plan), planned.plan.shardings
    planned_s = time.perf_counter()
    direct, fill_s, relaying = None, 0.0, hardware.relaying
    if planned.relay is not Relay.OFF:
        if relaying.cluster is not None:
            assert hardware.messages is not None
            fill_s = filling_s(planned.plan, hardware.messages, relaying.cluster, relaying.gpus)
        direct = bytes_matrix(plan_refit(sent, received, ranks_per_node=per_node))
    return _Figures(
        num_parameters=shardings[0].num_parameters,
        num_tensors=len(shardings[0].tensors),
        source_bytes=dict(shardings[0].bytes_per_rank),
        destination_bytes=dict(shardings[1].bytes_per_rank),
        encoding_needs=planned.encoding_needs,
        cost=planned.cost,
        matrix=matrix,
        relay=planned.relay,
        least={domain: least_bytes(sent, received, domain) for domain in hardware.ranks_per_domain},
        direct=direct,
        filling_s=fill_s,
        work_bytes=planned.work_bytes,
        changes=tuple(
            (each.share, bytes_matrix(planned.plan, each.nbytes), each.work_bytes) for each in planned.forecasts
        ),
        predict_s=predicted_s - start_s,
        plan_s=planned_s - predicted_s,
        expert_maps=expert_maps(shardings[1]) if destination.places_experts else (),
        wires=dict(planned.wires),
    )


def _without_relay(
    figures: _Figures, ranks_per_node: int, cluster: Cluster | None, gpus: GpuMap
) -> WithoutRelay | None:
    if figures.direct is None:
        return None
    traffic = split_traffic(figures.direct, ranks_per_node)
    bound = lower_bound(figures.direct, cluster, gpus, figures.work_bytes) if cluster else None
    return WithoutRelay(int(traffic.sent_between.sum()), int(traffic.sent_within.sum()), bound)


def _linear(model: ModelShape, side: SideSpec) -> SideSpec | None:
    """`side.linear`; None too where there are more ranks than experts, which then need redundant ones."""
    linear = side.linear
    if linear is None:
        return None
    try:
        check_side(model, linear, "destination")
    except UsageError:
        return None
    return linear


def _unquantised(scenario: Scenario) -> SideSpec | None:
    side = scenario.destination
    return (
        None if side.quantisation is None or "refit" not in scenario.measurements else replace(side, quantisation=None)
    )


def _with_destination(scenario: Scenario, destination: SideSpec | None, options: DryRunOptions) -> DryRun | None:
    if destination is None or options.alone:
        return None
    return dry_run(replace(scenario, destination=destination), options)
