"""vLLM's own reload of a running engine, from a checkpoint that is written for it: gather, write, reload."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from refit.bench.sides import Side
from refit.config.layout import Layout
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UnavailableError
from refit.memory.phases import PhaseClock
from refit.models.vllm.engine.serving import Serving, any_layer
from refit.plan.planner import plan_refit
from refit.predict.sides import PlannedSides, predict_side
from refit.predict.vllm.names import followed_name
from refit.predict.vllm.parameters import Engines
from refit.transport.base import Program, RunReport, TransportOptions, get_transport
from refit.transport.ranks import Ranks

if TYPE_CHECKING:
    from refit.models.huggingface.whole import WholeModel

GATHERED_WITH = "gloo"
PACKED = "the engine packs them, so that their bits cannot be read: --check-forward compares what it generates"
FILE_NAME = "model.safetensors"


class VllmReloadEngine:
    """The `RefitEngine` that has the engine load a checkpoint of the source's weights."""

    uses_plan = False
    transport = "a checkpoint"

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._scenario, self._device = scenario, device
        self._ranks: Ranks | None = None
        self._not_moved: dict[str, str] = {}

    def check_available(self) -> None:
        """Raise UnavailableError without transformers, whose names a checkpoint has, or safetensors."""
        missing = next((name for name in ("transformers", "safetensors") if find_spec(name) is None), None)
        if missing is not None:
            raise UnavailableError(f"a checkpoint needs {missing}: pip install 'refit-benchmark[hf]'")

    def connect(self, planned: PlannedSides, ranks: Ranks) -> str | None:
        self.check_available()
        self._ranks = ranks
        return None

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        from refit.models.huggingface.whole import WholeModel

        scenario, ranks, shape = self._scenario, self._ranks, self._scenario.model
        serving = getattr(destination.model, "serving", None)
        assert ranks is not None, "connect comes first"
        assert isinstance(serving, Serving), "a running engine is refitted"
        assert shape is not None
        assert scenario.source.dtype is not None
        first, dtype = destination.spec.ranks[0], scenario.source.dtype
        model = WholeModel(shape, dtype, self._device) if ranks.rank == first else None
        held = predict_side(
            shape, SideSpec(Layout(1, 1, 1, 1, world_size=1, first_rank=first), format="fsdp2", dtype=dtype)
        )
        options = TransportOptions(scenario.staging_bytes, scenario.timeout_s)
        gathering = get_transport(GATHERED_WITH).prepare(
            plan_refit(source.sharding, held), ranks, source.weights, model.weights if model else None, options
        )
        self._not_moved = dict.fromkeys(packed_keys(shape, destination.spec, serving.facts.packed), PACKED)
        return _Reload(gathering, model, serving)

    def not_moved(self) -> Mapping[str, str]:
        return self._not_moved

    def note(self) -> str | None:
        return None


class _Reload:
    """One reload: the source's weights are gathered on the engine's rank, which writes them and has vLLM load them."""

    def __init__(self, gathering: Program, model: WholeModel | None, serving: Serving) -> None:
        self._gathering, self._model, self._serving = gathering, model, serving
        self._folder = tempfile.TemporaryDirectory(prefix="refit-vllm-checkpoint-") if model is not None else None

    @property
    def staging_bytes(self) -> int:
        return self._gathering.staging_bytes

    def run(self) -> RunReport:
        clock = PhaseClock()
        gathered = self._gathering.run()
        clock.lap("gather")
        if self._folder is not None and self._model is not None and self._serving.process is not None:
            from safetensors.torch import save_file

            save_file(dict(self._model.checkpoint()), Path(self._folder.name) / FILE_NAME)
            clock.lap("write")
            self._serving.process.ask("reload", path=self._folder.name)
            clock.lap("reload")
        return replace(gathered, phases_s=dict(clock.phases_s))

    def close(self) -> None:
        self._gathering.close()
        if self._folder is not None:
            self._folder.cleanup()


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
