"""EncodedProgram: a transport's program between weights as the wire sees them, which encodings make and use."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from refit.config.registry import ENCODINGS, load
from refit.encodings.base import LiveEncoding, Peers
from refit.memory.weights import LocalWeights, generations, refresh_all
from refit.plan.plan import RefitPlan
from refit.plan.wire import Wire
from refit.transport.base import Program, RunReport

Prepare = Callable[[LocalWeights | None, LocalWeights | None], Program]
"""Prepares the transfer of a source's weights to a destination's."""


class EncodedProgram:
    """The `Program` of one rank. `prepare` is called with the weights that the wire sees."""

    def __init__(
        self,
        plan: RefitPlan,
        wires: Mapping[str, Wire],
        peers: Peers,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        prepare: Prepare,
    ) -> None:
        """`wires` by the names of their encodings, in the order in which a source applies them; `plan` is that of the
        last one. Collective, as `prepare` is."""
        self._live: list[LiveEncoding] = []
        self._held = [destination]
        for name, wire in wires.items():
            bind = ENCODINGS[name].bind
            assert bind is not None, f"{name} states what it sends and does not send it"
            live: LiveEncoding = load(bind)(plan, wire, peers, source, destination)
            source, destination = live.source, live.destination
            self._live.append(live)
            self._held.append(destination)
        self._program = prepare(source, destination)
        refresh_all(*self._held)
        for live in self._live:
            live.prepared()

    @property
    def staging_bytes(self) -> int:
        """That of the transport and of the encodings."""
        return self._program.staging_bytes + sum(live.staging_bytes for live in self._live)

    def run(self) -> RunReport:
        """Encode and transfer. Raises RefitError as encodings and transports do."""
        with torch.no_grad():
            begun: dict[str, float] = {}
            for live in self._live:
                since = time.perf_counter()
                live.begin()
                begun |= dict.fromkeys(live.phases[:1], time.perf_counter() - since)
            generation = generations(self._held[-1])
            report = self._program.run()
            phases = {name: 0.0 for live in self._live for name in live.phases} | report.phases_s
            for name, seconds in begun.items():
                phases[name] += seconds
            beside: dict[str, float] = {}
            since = time.perf_counter()
            if generations(self._held[-1]) != generation:
                refresh_all(*self._held)
            for live in reversed(self._live):  # a destination undoes first what was done last
                live.finish()
                now = time.perf_counter()
                beside |= live.beside_s(now - since)
                if live.phases:
                    phases[live.phases[-1]] += now - since
                    since = now
        counts = {name: number for live in self._live for name, number in live.counted().items()}
        remarks = [live.remark for live in self._live if live.remark is not None]
        return replace(report, phases_s=phases, beside_s=beside, counts=counts, remark="; ".join(remarks) or None)

    def forget(self, reason: str) -> None:
        """The destination has got weights by another way, for which `reason` stands: what was sent before is void."""
        for live in self._live:
            live.forget(reason)

    def close(self) -> None:
        self._program.close()
        refresh_all(*self._held)
        for live in self._live:
            live.close()
        self._live, self._held = [], []
