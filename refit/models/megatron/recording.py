"""Records the parts of a training step: Megatron's own timers, and marks around the phases of its MoE layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.pipeline_parallel import combined_1f1b
from megatron.core.transformer.moe.moe_layer import MoELayer

from refit.models.megatron.build import BuiltModel
from refit.models.sharded_model import Recorder, part

TIMERS = {"forward-compute": "forward", "backward-compute": "backward", "all-grads-sync": "gradient sync"}
"""Timers that the schedules start and stop (pipeline_parallel/schedules.py), and the parts they are."""

BOTH = "forward and backward"
"""The part of the combined schedule, which computes the forward pass of one micro-batch with the backward pass of
another. Its timer is called `forward-compute` and leaves the last backward passes out."""

WAITS = ("pre_forward", "pre_backward", "post_backward")
"""Actions of the combined schedule on its computing stream that wait for other stages (`post_forward` has a stream of
its own)."""

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
    is_combined = any(config.overlap_moe_expert_parallel_comm for config in configs)
    parts = {name: each for name, each in TIMERS.items() if not (is_combined and name.endswith("-compute"))}
    for config in configs:
        config.timers = _Timers(recorder, parts)
    for layer in layers:
        for method, phase in PHASES.items():
            setattr(layer, method, _marked(getattr(layer, method), phase, recorder))
    try:
        with _combined_steps(recorder) if is_combined else contextlib.nullcontext():
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
    parts: Mapping[str, str]

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return _Timer(self.recorder, self.parts.get(name))


@contextlib.contextmanager
def _combined_steps(recorder: Recorder) -> Iterator[None]:
    """Each step of the combined schedule is recorded, without its waits for other stages."""
    step: Callable[..., Any] = combined_1f1b.combined_forward_backward_step

    def recorded_step(*arguments: Any, **options: Any) -> Any:
        waits = {name: _outside(options[name], recorder) for name in WAITS if options.get(name) is not None}
        with part(recorder, BOTH):
            return step(*arguments, **{**options, **waits})

    with patch.object(combined_1f1b, "combined_forward_backward_step", recorded_step):
        yield


def _outside(wait: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """`wait`, which is called within a combined step, is no part of it."""

    def run(*arguments: Any, **options: Any) -> Any:
        recorder.stop(BOTH)
        found = wait(*arguments, **options)
        recorder.start(BOTH)
        return found

    return run


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


def _marked(method: Callable[..., Any], phase: str, recorder: Recorder) -> Callable[..., Any]:
    """`method` with its forward and its backward recorded. Gradients reach its outputs first, then its inputs."""

    def run(*arguments: Any, **options: Any) -> Any:
        arguments = _mark(arguments, lambda: recorder.stop(f"{phase} backward"))
        recorder.start(f"{phase} forward")
        outputs = method(*arguments, **options)
        recorder.stop(f"{phase} forward")
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        marked = _mark(several, lambda: recorder.start(f"{phase} backward"))
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
