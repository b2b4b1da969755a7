"""Faults to inject into a refit, for tests of the oracle. Each is a context that holds on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch

from refit.bench.engines import refit as planned_engine
from refit.bench.measurements import refit as planned_refit
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan import proof
from refit.plan.cost import cost_of
from refit.plan.plan import RefitPlan
from refit.predict.sides import PlannedSides
from refit.transport.base import RunReport, TransportOptions, get_transport
from refit.transport.ranks import Ranks
from refit.transport.two_sided import gloo
from tests.plan.strategies import staged


@contextmanager
def byte_flipped_in_flight() -> Iterator[None]:
    """One byte of the first message of a refit arrives changed, on the rank that runs this."""
    original = gloo.GlooBackend.wait_received
    done = False

    def corrupting(self: Any, pending: Any) -> None:
        nonlocal done
        original(self, pending)
        if pending.receives and not done:
            done = True
            pending.receives[0].buffer[3] ^= 0x40

    with mock.patch.object(gloo.GlooBackend, "wait_received", corrupting):
        yield


@contextmanager
def transfer_skipped(key: str) -> Iterator[None]:
    """The plan lacks one transfer of tensor `key`. The plan's own checks are off, since they would refuse it."""

    def lacking(plan: RefitPlan) -> RefitPlan:
        number = next(i for i, each in enumerate(plan.classes) if key in (tensor.key for tensor in each.tensors))
        kept = np.delete(np.arange(len(plan)), np.flatnonzero((plan.tensor_class == number) & plan.is_wire)[0])
        return replace(
            plan,
            stage=plan.stage[kept],
            tensor_class=plan.tensor_class[kept],
            source=plan.source[kept],
            destination=plan.destination[kept],
            boxes=plan.boxes[kept],
        )

    with _transport(change_plan=lacking), mock.patch.object(proof, "check"):
        yield


@contextmanager
def parts_swapped(key: str) -> Iterator[None]:
    """The first two shards of tensor `key` are swapped: gate and up, or two experts."""

    def swapped(memory: LocalWeights | None) -> LocalWeights | None:
        if memory is None:
            return None
        shards = list(memory)
        first, second = [index for index, shard in enumerate(shards) if shard.tensor.key == key][:2]
        a, b = shards[first], shards[second]
        shards[first] = LocalShard(a.tensor, a.box, b.owner, b.view)
        shards[second] = LocalShard(b.tensor, b.box, a.owner, a.view)
        return LocalWeights(shards)

    with _transport(change_destination=swapped):
        yield


@contextmanager
def last_iteration_repeated() -> Iterator[None]:
    """From the second refit on, the destination ends up with the weights of the previous refit."""
    before: list[torch.Tensor] = []

    def after_run(destination: LocalWeights | None) -> None:
        views = [shard.view for shard in destination] if destination is not None else []
        now = [view.clone() for view in views]
        for view, old in zip(views, before, strict=False):
            view.copy_(old)
        before[:] = now

    with _transport(after_run=after_run):
        yield


@contextmanager
def none_but_stages(number: str) -> Iterator[None]:
    """No fault: the refit is planned in so many stages, which no method asks for yet."""
    original = planned_refit.plan_sides

    def in_stages(*args: Any) -> PlannedSides:
        planned = original(*args)
        plan = staged(*planned.plan.shardings, int(number), Random(1))
        return replace(planned, plan=plan, cost=cost_of(plan))

    with mock.patch.object(planned_refit, "plan_sides", in_stages):
        yield


@contextmanager
def _transport(
    change_plan: Callable[[RefitPlan], RefitPlan] = lambda plan: plan,
    change_destination: Callable[[LocalWeights | None], LocalWeights | None] = lambda memory: memory,
    after_run: Callable[[LocalWeights | None], None] = lambda memory: None,
) -> Iterator[None]:
    """The real transport, prepared from changed inputs or with a change after every run."""

    class Faulty:
        def __init__(self, name: str) -> None:
            self._real = get_transport(name)
            self.connect = self._real.connect
            self.check_available = self._real.check_available

        def prepare(
            self, plan: RefitPlan, ranks: Ranks, source: Any, destination: Any, options: TransportOptions
        ) -> Any:
            program = self._real.prepare(change_plan(plan), ranks, source, change_destination(destination), options)
            real_run = program.run

            def run() -> RunReport:
                report = real_run()
                after_run(destination)
                return report

            return mock.Mock(wraps=program, run=run, staging_bytes=program.staging_bytes)

    with mock.patch.object(planned_engine, "get_transport", Faulty):
        yield


def fault(name: str | None, *args: str) -> Any:
    """A fault by name, so that a test can send it to rank processes; no name, no fault."""
    return globals()[name](*args) if name else nullcontext()
