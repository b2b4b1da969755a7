"""A plugin: a transport and a launcher that the suite does not have, in one module outside of it.

    refit run --plugin examples.plugin --refit-method queue --model tiny --rl-inference-tensor-model-parallel-size 2
    refit sweep run --plugin examples.plugin --launcher nice --scenarios tiny --cpu-fallback --output-dir results

A format, an encoding, an engine or a measurement is added in the same way: see "The seams" in docs/architecture.md.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from refit.config.registry import LAUNCHERS, METHODS
from refit.config.rows import LauncherKind, Method
from refit.copies.batch import local_batches
from refit.launch.base import Job
from refit.launch.local import LocalLauncher
from refit.memory.weights import LocalWeights
from refit.plan.plan import RankPlan, RefitPlan, Transfer
from refit.transport.base import DEFAULTS, Program, RunReport, TransportOptions
from refit.transport.ranks import Ranks

REFIT_INTERFACE = 1
"""The version of the suite's interface that this was written for."""

QUEUE = Method(transport="examples.plugin:QueueTransport", devices=("cpu",), needs="the ranks' store")
NICE = LauncherKind(launcher="examples.plugin:NiceLauncher", title="this machine, behind all else that runs there")


def register() -> None:
    """Called once in every process of a run that names this plugin."""
    METHODS.add("queue", QUEUE)
    LAUNCHERS.add("nice", NICE)


class NiceLauncher(LocalLauncher):
    """Ranks that give way to other processes."""

    def command(self, job: Job) -> Sequence[str]:
        return ["nice", *super().command(job)]


class QueueTransport:
    """Every transfer is an entry of a queue in the ranks' store: slow, and short enough to read."""

    name = "queue"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        """Ranks always have a store."""

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> None:
        """The store is connected already."""

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        return QueueProgram(plan.for_rank(ranks.rank), ranks.store, source, destination)


class QueueProgram:
    """One rank's part of a refit, which may run any number of times."""

    staging_bytes = 0

    def __init__(
        self, part: RankPlan, store: Store, source: LocalWeights | None, destination: LocalWeights | None
    ) -> None:
        self._part = part
        self._source = source
        self._destination = destination
        self._store = store
        self._sent: dict[int, int] = {}
        self._taken: dict[int, int] = {}

    def run(self) -> RunReport:
        for batch in local_batches(self._part.local, self._part.zeros, self._source, self._destination, 1 << 20):
            batch.run()
        for transfer in self._part.sends:
            assert self._source is not None
            views = self._source.views(transfer.tensor.key, transfer.box)
            data = [(view.box, view.data.float().numpy()) for view in views]
            self._store.set(self._key(self._sent, transfer.source, transfer.destination), pickle.dumps(data))
        for transfer in self._part.receives:
            self._take(transfer)
        return RunReport(wire_bytes_received=sum(transfer.nbytes for transfer in self._part.receives))

    def close(self) -> None:
        pass

    def _take(self, transfer: Transfer) -> None:
        assert self._destination is not None
        key = self._key(self._taken, transfer.destination, transfer.source, backwards=True)
        self._store.wait([key])
        for box, values in pickle.loads(self._store.get(key)):
            for view in self._destination.views(transfer.tensor.key, box):
                view.data.copy_(torch.from_numpy(values)[view.box.slices_within(box)])
        self._store.delete_key(key)

    def _key(self, counts: dict[int, int], mine: int, peer: int, backwards: bool = False) -> str:
        counts[peer] = counts.get(peer, 0) + 1
        pair = (peer, mine) if backwards else (mine, peer)
        return f"queue/{pair[0]}/{pair[1]}/{counts[peer]}"
