"""vLLM's own updates of a running engine: its reload from a checkpoint, and its copy by CUDA IPC."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from refit.bench.sides import Side
from refit.config.layout import Layout
from refit.config.quantisation import SCALE_SUFFIX, Quantisation
from refit.config.registry import method_of_links
from refit.config.rows import BETWEEN, WITHIN
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.encodings.fp8.reference import quantise
from refit.errors import UnavailableError
from refit.memory.phases import PhaseClock
from refit.models.vllm.engine.serving import Serving, any_layer
from refit.models.vllm.engine.side import kept_modules
from refit.plan.planner import plan_refit
from refit.predict.sides import PlannedSides, predict_side
from refit.predict.vllm.names import followed_name
from refit.predict.vllm.parameters import Engines
from refit.transport.base import Connected, Program, RunReport, TransportOptions, get_transport
from refit.transport.ranks import Ranks

if TYPE_CHECKING:
    from refit.models.huggingface.whole import WholeModel

GATHERED_WITH = {"cpu": BETWEEN, "cuda": WITHIN}
"""By device: the links whose method gathers."""

PACKED = "the engine packs them, so that their bits cannot be read: --check-forward compares what it generates"
FILE_NAME = "model.safetensors"


class _OwnUpdate:
    """What both `RefitEngine`s share: the source's weights are gathered, whole, by the rank that has the engine."""

    uses_plan = False
    transport: str

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._scenario, self._device = scenario, device
        self._ranks: Ranks | None = None
        self._not_moved: dict[str, str] = {}

    def check_available(self) -> None:
        """Raise UnavailableError without transformers, whose names a checkpoint has, or safetensors."""
        missing = next((name for name in ("transformers", "safetensors") if find_spec(name) is None), None)
        if missing is not None:
            raise UnavailableError(f"a checkpoint needs {missing}: pip install 'refit-benchmark[hf]'")

    def connect(self, planned: PlannedSides, ranks: Ranks) -> Connected | None:
        self.check_available()
        self._ranks = ranks
        return None

    def not_moved(self) -> Mapping[str, str]:
        return self._not_moved

    def note(self) -> str | None:
        return None

    def _gathered(self, source: Side, destination: Side) -> _Gathered:
        """Collective: every rank of the job."""
        from refit.models.huggingface.whole import WholeModel

        scenario, ranks, shape = self._scenario, self._ranks, self._scenario.model
        serving = getattr(destination.model, "serving", None)
        assert ranks is not None, "connect comes first"
        assert isinstance(serving, Serving), "a running engine is refitted"
        assert shape is not None
        assert scenario.source.dtype is not None
        first, dtype = destination.spec.ranks[0], scenario.source.dtype
        model = WholeModel(shape, dtype, self._device) if ranks.rank == first else None
        held = predict_side(shape, SideSpec(Layout(1, 1, 1, 1, world_size=1, first_rank=first), "fsdp2", dtype))
        options = TransportOptions(scenario.staging_bytes, scenario.timeout_s)
        method = method_of_links(self._device.type, GATHERED_WITH[self._device.type])
        gathering = get_transport(method).prepare(
            plan_refit(source.sharding, held), ranks, source.weights, model.weights if model else None, options
        )
        self._not_moved = dict.fromkeys(packed_keys(shape, destination.spec, serving.facts.packed), PACKED)
        quantised = destination.spec.quantisation
        kept = frozenset(kept_modules(shape, destination.spec)) if quantised is not None else frozenset[str]()
        return _Gathered(gathering, model, serving, quantised, kept)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What brings the source's weights together; `model` is where, on the rank that has the engine.

    With `quantisation` a checkpoint has codes and scales of all matrices but those of the modules in `kept`.
    """

    program: Program
    model: WholeModel | None
    serving: Serving
    quantisation: Quantisation | None
    kept: frozenset[str]

    def checkpoint(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of a checkpoint of the engine's dtype, on the rank that has the model."""
        assert self.model is not None
        for name, tensor in self.model.checkpoint():
            if self.quantisation is None or tensor.ndim < 2 or name.removesuffix(".weight") in self.kept:
                yield name, tensor
            else:
                made = quantise(tensor, self.quantisation)
                yield from ((name, made.codes), (f"{name}{SCALE_SUFFIX}", made.scales))


class VllmReloadEngine(_OwnUpdate):
    """Has the engine load a checkpoint of the source's weights."""

    transport = "a checkpoint"

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        return _Reload(self._gathered(source, destination))


class VllmIpcEngine(_OwnUpdate):
    """Has the engine copy tensors with a checkpoint's names from the GPU's memory: its `ipc` weight transfer."""

    transport = "CUDA IPC"

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        return _Update(self._gathered(source, destination))


class _Reload:
    """One reload: the source's weights are gathered on the engine's rank, which writes them and has vLLM load them."""

    def __init__(self, gathered: _Gathered) -> None:
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

    def __init__(self, gathered: _Gathered) -> None:
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


def packed_keys(shape: ModelShape, side: SideSpec, packed: Sequence[str]) -> list[str]:
    """The logical tensors that fill the parameters `packed`, which have `*` for the layer."""
    engines, kinds = Engines(shape, side), {followed_name(name) for name in packed}
    return list(
        dict.fromkeys(
            block.block.key_prefix + piece.key
            for block in engines.blocks_of(engines.engine.place(0))
            for parameter in block.parameters
            if any_layer(block.block.prefix + parameter.name) in kinds
            for piece in parameter.pieces
        )
    )
