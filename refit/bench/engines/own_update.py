"""What own updates of a running engine begin with: the source's weights as a checkpoint's, on the engine's rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

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
from refit.models.vllm.engine.serving import Serving, any_layer
from refit.models.vllm.engine.side import kept_modules
from refit.plan.planner import plan_refit
from refit.predict.sides import PlannedSides, predict_side
from refit.predict.vllm.names import followed_name
from refit.predict.vllm.parameters import Engines
from refit.transport.base import Connected, Program, TransportOptions, get_transport
from refit.transport.ranks import Ranks

if TYPE_CHECKING:
    from refit.models.huggingface.whole import WholeModel

GATHERED_WITH = {"cpu": BETWEEN, "cuda": WITHIN}
"""By device: the links whose method gathers."""

PACKED = "the engine packs them, so that their bits cannot be read: --check-forward compares what it generates"


class OwnUpdate:
    """What their `RefitEngine`s share: the rank that has the engine gathers the source's weights, whole."""

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

    def gathered(self, source: Side, destination: Side) -> Gathered:
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
        return Gathered(gathering, model, serving, quantised, kept)


@dataclass(frozen=True, slots=True)
class Gathered:
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
