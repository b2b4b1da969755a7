"""This suite's own refit: the scenario's transport executes the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from refit.bench.sides import Side
from refit.config.registry import ENCODINGS
from refit.config.scenario import Scenario
from refit.encodings.delta.choice import Bounds
from refit.memory.weights import LocalWeights
from refit.plan.cost import bytes_matrix, lower_bound, per_gpu, wire_only
from refit.predict.sides import PlannedSides
from refit.transport.base import Connected, Program, TransportOptions, get_transport
from refit.transport.chosen import ChosenProgram
from refit.transport.encoded import EncodedProgram
from refit.transport.ranks import Ranks, gpus_here
from refit.transport.rendezvous import Rendezvous


class PlannedEngine:
    """The `RefitEngine` that uses a transport of `METHODS`."""

    uses_plan = True

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self.transport = scenario.way
        self._transport = get_transport(scenario.method)
        self._encoding, self._cluster = scenario.encoding, scenario.cluster
        self._ranks_per_gpu = scenario.ranks_per_gpu
        self._ranks: Ranks | None = None
        self._options = options_of(scenario, device)

    def check_available(self) -> None:
        self._transport.check_available(self._options)

    def connect(self, planned: PlannedSides, ranks: Ranks) -> Connected | None:
        self._ranks = ranks
        return self._transport.connect(planned.plan, ranks, self._options_of(planned))

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        plan, wires, options, ranks = planned.plan, planned.wires, self._options_of(planned), self._ranks
        assert ranks is not None, "connect comes first"

        def prepare(sent: LocalWeights | None, received: LocalWeights | None) -> Program:
            return self._transport.prepare(plan, ranks, sent, received, options)

        if not wires:
            return prepare(source.weights, destination.weights)
        peers = Rendezvous(ranks, f"encodings/{plan.digest}", plan.ranks, options.timeout_s)
        if not ENCODINGS[self._encoding].num_to_decide:
            return EncodedProgram(plan, wires, peers, source.weights, destination.weights, prepare)
        options = replace(options, staging_bytes=options.staging_bytes // 2)
        everything = self._everything(planned, source, destination, options)
        changes = EncodedProgram(plan, wires, peers, source.weights, destination.weights, prepare)
        chooser = Rendezvous(ranks, f"choice/{plan.digest}", plan.ranks, options.timeout_s)
        return ChosenProgram(chooser, everything, changes, self._bounds(planned))

    def _everything(self, planned: PlannedSides, source: Side, destination: Side, options: TransportOptions) -> Program:
        """Moves the same plan without the last encoding, which only packs messages."""
        plan, wires, ranks = planned.plan, dict(list(planned.wires.items())[:-1]), self._ranks
        assert ranks is not None
        options = replace(options, max_bytes=None)

        def prepare(sent: LocalWeights | None, received: LocalWeights | None) -> Program:
            return self._transport.prepare(plan, ranks, sent, received, options)

        if not wires:
            return prepare(source.weights, destination.weights)
        peers = Rendezvous(ranks, f"encodings/{plan.digest}", plan.ranks, options.timeout_s)
        return EncodedProgram(plan, wires, peers, source.weights, destination.weights, prepare)

    def _bounds(self, planned: PlannedSides) -> Bounds | None:
        """On the scenario's cluster; None without one, or without the speed of its memory."""
        matrix, cluster, gpus = bytes_matrix(planned.plan), self._cluster, gpus_here(self._ranks_per_gpu)
        if cluster is None or cluster.copy_bytes_per_s is None:
            return None
        full = lower_bound(matrix, cluster, gpus, planned.work_bytes)
        # Reading old and new takes as long as copying one of them.
        sent = per_gpu(wire_only(matrix), gpus).sum(axis=1)
        return None if full is None else Bounds(full.seconds, float(sent.max()) / cluster.copy_bytes_per_s)

    def _options_of(self, planned: PlannedSides) -> TransportOptions:
        is_pipelined = any(wire.is_pipelined for wire in planned.wires.values())
        return replace(self._options, is_pipelined=is_pipelined, max_bytes=planned.max_bytes)

    def not_moved(self) -> Mapping[str, str]:
        return {}

    def note(self) -> str | None:
        return None


def options_of(scenario: Scenario, device: torch.device) -> TransportOptions:
    """The settings of a scenario with weights on `device`, without those that follow from its plan."""
    return TransportOptions(
        staging_bytes=scenario.staging_bytes,
        timeout_s=scenario.timeout_s,
        own=scenario.own_options,
        device_type=device.type,
        ranks_per_gpu=scenario.ranks_per_gpu,
    )
