"""Runs a model's forward pass in float32, whatever dtype its weights have, without a float32 copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def computing_in_float32(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within this context, each module of `models` has its 16-bit parameters and buffers in float32 while it runs.

    The values are the same, so that nothing is left of two passes' differences but float32's rounding. A module's
    float32 copy is made before it runs and freed after it: the memory that this takes is that of the largest module.
    The weights themselves are neither written nor moved.
    """
    with ExitStack() as stack:
        for module in (module for model in models for module in model.modules()):
            holders = [module, *(child for child in module.children() if _only_holds(child) or _is_convolution(child))]
            if any(holder._parameters or holder._buffers for holder in holders) and not _only_holds(module):
                _cast_while_running(module, holders, stack)
        yield


def in_float32(value: Any) -> Any:
    """A tensor of 16 bits in float32, and anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def _only_holds(module: torch.nn.Module) -> bool:
    """Whether the module has no forward pass of its own: the one around it uses its parameters."""
    return type(module).forward is torch.nn.Module.forward and "forward" not in vars(module)


def _is_convolution(module: torch.nn.Module) -> bool:
    """Whether the module around it may use its weight: delta nets convolve with functions of their own."""
    return isinstance(module, torch.nn.Conv1d)


def _cast_while_running(module: torch.nn.Module, holders: list[torch.nn.Module], stack: ExitStack) -> None:
    restore: list[Callable[[], None]] = []

    def before(_: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        for holder in holders:
            restore.extend(_cast(holder))
        # A tied output layer gets the embedding's weight as an argument.
        return tuple(map(in_float32, arguments)), {name: in_float32(value) for name, value in options.items()}

    def after(*_: Any) -> None:
        while restore:
            restore.pop()()

    # FSDP2 gathers a module's weights in a hook before it and frees them in one after it: both are farther out.
    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, prepend=True, always_call=True),
    ):
        stack.callback(handle.remove)


def _cast(module: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Replace the module's 16-bit tensors; each function returned puts one back."""
    both: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
    for held in both:
        for name, tensor in held.items():
            if tensor is None or tensor.dtype not in HALVES:
                continue
            copy = tensor.detach().float()
            held[name] = torch.nn.Parameter(copy, tensor.requires_grad) if held is module._parameters else copy

            def put_back(held: dict[str, Any] = held, name: str = name, tensor: torch.Tensor = tensor) -> None:
                held[name] = tensor

            yield put_back
