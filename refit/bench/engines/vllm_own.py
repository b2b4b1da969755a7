"""vLLM's own updates of a running engine: its reload from a checkpoint, and its copy by CUDA IPC."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from refit.bench.engines.own_update import Gathered, OwnUpdate
from refit.bench.sides import Side
from refit.memory.phases import PhaseClock
from refit.predict.sides import PlannedSides
from refit.transport.base import Program, RunReport

FILE_NAME = "model.safetensors"


class VllmReloadEngine(OwnUpdate):
    """Has the engine load a checkpoint of the source's weights."""

    transport = "a checkpoint"

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        return _Reload(self.gathered(source, destination))


class VllmIpcEngine(OwnUpdate):
    """Has the engine copy tensors with a checkpoint's names from the GPU's memory: its `ipc` weight transfer."""

    transport = "CUDA IPC"

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        return _Update(self.gathered(source, destination))


class _Reload:
    """One reload: the source's weights are gathered on the engine's rank, which writes them and has vLLM load them."""

    def __init__(self, gathered: Gathered) -> None:
        self._gathered = gathered
        self._folder = tempfile.TemporaryDirectory(prefix="refit-vllm-checkpoint-") if gathered.model else None

    @property
    def staging_bytes(self) -> int:
        return self._gathered.program.staging_bytes

    def run(self) -> RunReport:
        clock, model, process = PhaseClock(), self._gathered.model, self._gathered.serving.process
        report = self._gathered.program.run()
        clock.lap("gather")
        if self._folder is not None and model is not None and process is not None:
            from safetensors.torch import save_file

            save_file(dict(self._gathered.checkpoint()), Path(self._folder.name) / FILE_NAME)
            clock.lap("write")
            process.ask("reload", path=self._folder.name)
            clock.lap("reload")
        return replace(report, phases_s=dict(clock.phases_s))

    def close(self) -> None:
        self._gathered.program.close()
        if self._folder is not None:
            self._folder.cleanup()


class _Update:
    """One update. `convert` makes what vLLM's call takes, which is timed apart: new values have other handles."""

    def __init__(self, gathered: Gathered) -> None:
        self._gathered = gathered
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self._handles: list[dict[str, Any]] = []

    @property
    def staging_bytes(self) -> int:
        return self._gathered.program.staging_bytes

    def convert(self) -> dict[str, float]:
        """Gather the weights under a checkpoint's names, then export them. Returns seconds by phase."""
        clock, model = PhaseClock(), self._gathered.model
        self._gathered.program.run()
        if model is not None:
            self._tensors = list(self._gathered.checkpoint())
            torch.cuda.synchronize()
        clock.lap("convert")
        if model is not None:
            gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self._handles = [{gpu: reduce_tensor(tensor)[1]} for _, tensor in self._tensors]  # type: ignore[no-untyped-call]
        clock.lap("handles")
        return dict(clock.phases_s)

    def run(self) -> RunReport:
        process = self._gathered.serving.process
        if process is None:
            return RunReport()
        seconds = process.ask(
            "update",
            names=[name for name, _ in self._tensors],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in self._tensors],
            shapes=[list(tensor.shape) for _, tensor in self._tensors],
            handles=self._handles,
        )
        return RunReport(phases_s=seconds)

    def close(self) -> None:
        self._gathered.program.close()
