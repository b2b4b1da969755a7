"""This suite's own refit: the scenario's transport executes the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from refit.bench.sides import Side
from refit.config.scenario import Scenario
from refit.encodings.fp8.program import QuantisingProgram
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.plan.quantised import WireShardings
from refit.transport.base import Program, TransportOptions, get_transport
from refit.transport.ranks import Ranks


class PlannedEngine:
    """The `RefitEngine` that uses a transport of `METHODS`."""

    uses_plan = True

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self.transport = scenario.method
        self._transport = get_transport(scenario.method)
        self._ranks: Ranks | None = None
        self._options = TransportOptions(
            staging_bytes=scenario.staging_bytes,
            timeout_s=scenario.timeout_s,
            one_sided_buffers=scenario.one_sided_buffers,
            one_sided_force_put=scenario.nvshmem_force_put,
        )

    def check_available(self) -> None:
        self._transport.check_available()

    def connect(self, plan: RefitPlan, ranks: Ranks) -> str | None:
        self._ranks = ranks
        return self._transport.connect(plan, ranks, self._options)

    def prepare(self, plan: RefitPlan, source: Side, destination: Side, wire: WireShardings | None = None) -> Program:
        weights, quantisation = (source.weights, destination.weights), destination.spec.quantisation
        options, ranks = replace(self._options, is_pipelined=wire is not None), self._ranks
        assert ranks is not None, "connect comes first"

        def prepare(sent: LocalWeights | None, received: LocalWeights | None) -> Program:
            return self._transport.prepare(plan, ranks, sent, received, options)

        if wire is None or quantisation is None:
            return prepare(*weights)
        return QuantisingProgram(plan, wire, quantisation, ranks.rank, *weights, prepare)

    def not_moved(self) -> Mapping[str, str]:
        return {}

    def note(self) -> str | None:
        return None
