"""A baseline: checkpoint-engine (Moonshot AI), which updates a running vLLM from a checkpoint in pinned host memory.

Its parameter server copies the checkpoint to the GPU in buckets, broadcasts each among its ranks, and has vLLM's worker
load the tensors of a bucket by their names from memory that both processes map.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from refit.bench.engines.own_update import Gathered, OwnUpdate
from refit.bench.sides import Side
from refit.errors import RefitError, UnavailableError
from refit.memory.phases import PhaseClock
from refit.predict.sides import PlannedSides
from refit.transport.base import Program, RunReport

MODULE = "checkpoint_engine"
NAME = "refit"
"""That of the checkpoint, whose host memory the next one gets."""


class CheckpointEngine(OwnUpdate):
    """Has checkpoint-engine update the engine."""

    transport = "pinned host memory"

    def check_available(self) -> None:
        super().check_available()
        if find_spec(MODULE) is None:
            raise UnavailableError(
                "checkpoint-engine is not installed: pip install 'refit-benchmark[checkpoint-engine]', and "
                "checkpoint-engine where vLLM is"
            )

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        gathered = self.gathered(source, destination)
        process = gathered.serving.process
        if process is not None and not process.ask("has_module", name=MODULE):
            raise UnavailableError(
                "the engine's environment has no checkpoint-engine: pip install checkpoint-engine there"
            )
        server = _server(self._scenario.timeout_s) if process is not None else None
        return _Update(gathered, server)


def _server(timeout_s: float) -> Any:
    """A parameter server of this rank alone, whose GPU the engine shares, with its own settings: buckets of 8 GiB, two
    of them and one to copy to. It broadcasts over NCCL, as it does by itself, not over the job's default group."""
    import zmq
    from checkpoint_engine.distributed import base
    from checkpoint_engine.ps import ParameterServer
    from loguru import logger

    logger.disable("checkpoint_engine")
    group = dist.new_group([dist.get_rank()], backend="nccl")
    base._BACKEND_INSTANCE = _over(base.TorchBackend, group)
    os.environ.setdefault("RANK", "0")  # it takes rank=0 for none: findings/checkpoint-engine-ignores-rank-zero.sh
    server = ParameterServer(rank=0, world_size=1, auto_pg=False, gpu_count=1, master_addr="127.0.0.1", master_port=0)
    # Where the engine fails, it does not answer, and a socket waits for ever.
    server._zmq_ctx.setsockopt(zmq.RCVTIMEO, int(1e3 * timeout_s))
    return server


def _over(backend: type, group: dist.ProcessGroup) -> Any:
    """An instance of checkpoint-engine's `backend` whose default group is `group`."""

    class Over(backend):  # type: ignore[misc]
        def all_gather_object(self, object_list: list[Any], obj: Any, _group: Any = None) -> None:
            super().all_gather_object(object_list, obj, group)

        def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, _group: Any = None, **_: Any) -> None:
            super().all_reduce(tensor, op, group)

        def broadcast(self, tensor: torch.Tensor, src: int = 0, _group: Any = None, **_: Any) -> None:
            super().broadcast(tensor, src, group)

        def barrier(self, _group: Any = None, **_: Any) -> None:
            super().barrier(group)

    return Over()


class _Update:
    """One update. `convert` makes the checkpoint in pinned host memory, which is timed apart."""

    def __init__(self, gathered: Gathered, server: Any) -> None:
        self._gathered, self._server = gathered, server

    @property
    def staging_bytes(self) -> int:
        return self._gathered.program.staging_bytes

    def convert(self) -> dict[str, float]:
        """Gather the weights under a checkpoint's names, then copy them to the host. Returns seconds by phase."""
        clock, server = PhaseClock(), self._server
        self._gathered.program.run()
        if server is not None:
            tensors = dict(self._gathered.checkpoint())
            torch.cuda.synchronize()
            clock.lap("convert")
            server.unregister_checkpoint(NAME)
            server.register_checkpoint(NAME, named_tensors=tensors, use_shared_memory_pool=True)
            clock.lap("to the host")
        return dict(clock.phases_s)

    def run(self) -> RunReport:
        clock, server, process = PhaseClock(), self._server, self._gathered.serving.process
        if server is None or process is None:
            return RunReport()
        server.gather_metas(NAME)
        clock.lap("gather metas")
        failed: list[Exception] = []

        def ask(addresses: list[tuple[str, str]]) -> None:
            try:
                process.ask("receive", addresses=dict(addresses))
            except Exception as error:
                failed.append(error)

        try:
            server.update(NAME, ask)
        except Exception as error:
            raise (failed or [RefitError(f"checkpoint-engine: {error}")])[0] from error
        if failed:
            raise failed[0]
        clock.lap("update")
        return RunReport(phases_s=dict(clock.phases_s))

    def close(self) -> None:
        self._gathered.program.close()
        if self._server is not None:
            self._server.unregister_checkpoint(NAME, force=True)
