"""Records the parts of a training step: Megatron's own timers, and marks around the phases of its MoE layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from refit.models.megatron.build import BuiltModel
from refit.models.sharded_model import Recorder

TIMERS = {"forward-compute": "forward", "backward-compute": "backward", "all-grads-sync": "gradient sync"}
"""Timers that the schedules start and stop (pipeline_parallel/schedules.py), and the parts they are."""

PHASES = {"route": "route", "preprocess": "route", "dispatch": "dispatch", "routed_experts_compute": "experts"}
PHASES |= {"combine": "combine"}
"""Methods of MoELayer, in the order in which a forward pass calls them, and the parts they are."""


@contextlib.contextmanager
def recorded(built: BuiltModel, optimizer: Any, recorder: Recorder | None) -> Iterator[None]:
    """Tell `recorder` when parts of a step begin and end; without one, nothing is changed."""
    if recorder is None:
        yield
        return
    configs: list[Any] = [*{id(chunk.config): chunk.config for chunk in built.chunks}.values()]
    layers = [module for chunk in built.chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    for config in configs:
        config.timers = _Timers(recorder)
    for layer in layers:
        for method, part in PHASES.items():
            setattr(layer, method, _marked(getattr(layer, method), part, recorder))
    try:
        yield
    finally:
        for config in configs:
            config.timers = None
        for layer in layers:
            for method in PHASES:
                delattr(layer, method)


@dataclass(frozen=True, slots=True)
class _Timer:
    recorder: Recorder
    part: str | None

    def start(self, *_: Any, **__: Any) -> None:
        if self.part is not None:
            self.recorder.start(self.part)

    def stop(self, *_: Any, **__: Any) -> None:
        if self.part is not None:
            self.recorder.stop(self.part)


@dataclass(frozen=True, slots=True)
class _Timers:
    """Called as Megatron's timers are: `timers("forward-compute", log_level=2).start()`."""

    recorder: Recorder

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return _Timer(self.recorder, TIMERS.get(name))


class _Mark(torch.autograd.Function):
    """Passes tensors on; calls `action` when their gradients come by."""

    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.action = action
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.action()
        return (None, *gradients)


def _marked(method: Callable[..., Any], part: str, recorder: Recorder) -> Callable[..., Any]:
    """`method` with its forward and its backward recorded. Gradients reach its outputs first, then its inputs."""

    def run(*arguments: Any, **options: Any) -> Any:
        arguments = _mark(arguments, lambda: recorder.stop(f"{part} backward"))
        recorder.start(f"{part} forward")
        outputs = method(*arguments, **options)
        recorder.stop(f"{part} forward")
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        marked = _mark(several, lambda: recorder.start(f"{part} backward"))
        return marked if isinstance(outputs, tuple) else marked[0]

    return run


def _mark(values: tuple[Any, ...], action: Callable[[], None]) -> tuple[Any, ...]:
    """`values` with all tensors that have a gradient sent through one mark."""
    places = [place for place, value in enumerate(values) if torch.is_tensor(value) and value.requires_grad]
    if not places:
        return values
    passed: tuple[Any, ...] = _Mark.apply(action, *(values[place] for place in places))  # type: ignore[no-untyped-call]
    marked = dict(zip(places, passed, strict=True))
    return tuple(marked.get(place, value) for place, value in enumerate(values))
