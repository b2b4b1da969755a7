"""Workarounds that training steps and forward passes need, each with the versions and the reason.

`trainable_on` runs Megatron-Core's training code on CPUs: CUDA's allocations, streams and type names become the CPU's.
What 0.16.1 and 0.19.2 name outright, and which it replaces: `device="cuda"` in the schedules
(pipeline_parallel/schedules.py), in gradient clipping (optimizer/clip_grads.py) and in the optimizers;
`torch.cuda.FloatTensor` in the distributed optimizer (optimizer/distrib_optimizer.py); CUDA streams and the copy of
split sizes to the CPU in the all-to-all dispatcher (transformer/moe/token_dispatcher.py); CUDA's random state in
recomputation (tensor_parallel/random.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

ALLOCATE = (torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor)


class _OnCpu(TorchFunctionMode):
    """Allocations on "cuda" go to the CPU. `Tensor.type()` gives the name of the CUDA type."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ALLOCATE and str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """A stream and an event whose work is done already, as all of a CPU's is."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _Stream:
        return self

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...


@contextlib.contextmanager
def trainable_on(device: torch.device) -> Iterator[None]:
    """Megatron's training code runs on `device`. Nothing changes on GPUs."""
    if device.type == "cuda":
        yield
        return
    dispatchers: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    random_state: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    stream = _Stream()
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("Stream", _Stream),
            ("Event", _Stream),
            ("current_stream", lambda *_: stream),
            ("default_stream", lambda *_: stream),
            ("stream", lambda *_: contextlib.nullcontext()),
            ("synchronize", lambda *_: None),
        ):
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(dispatchers, "maybe_move_tensor_to_cpu", _on_host))
        # Recomputation restores CUDA's random state, which nothing here draws from.
        stack.enter_context(patch.object(random_state, "_get_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(patch.object(random_state, "_set_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(_OnCpu())
        yield


@contextlib.contextmanager
def uncompiled_on(device: torch.device) -> Iterator[None]:
    """Megatron's fused functions run as they are on CPUs, where torch.compile would run a C++ compiler on every rank.

    For passes only: this imports torch's compiler, which building a model does without.
    """
    if device.type == "cuda":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Split sizes as the all-to-all takes them. Megatron's own function converts tensors of a GPU only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextlib.contextmanager
def norms_know_sequence_parallel() -> Iterator[None]:
    """Build the norms of the local layer spec under sequence parallelism too, which both versions refuse
    (torch_norm.py).

    A norm works on its part of the sequence as it is. What is missing is the mark on its parameters that makes
    `finalize_model_grads` sum their gradients over the tensor-parallel ranks.
    """
    norm: Any = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    original = norm.__new__

    def marked(cls: Any, config: Any, *args: Any, **options: Any) -> Any:
        parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            made = original(cls, config, *args, **options)
        finally:
            config.sequence_parallel = parallel
        for parameter in made.parameters():
            parameter.sequence_parallel = parallel
        return made

    norm.__new__ = marked
    try:
        yield
    finally:
        norm.__new__ = original


@contextlib.contextmanager
def gathering_within(group: dist.ProcessGroup) -> Iterator[None]:
    """Objects gathered from the default group come from `group` alone.

    Both versions compare parameter groups over all ranks of the job (`_get_param_groups` in optimizer/__init__.py), and
    ranks outside the side would never answer.
    """
    original = dist.all_gather_object

    def gather(found: list[Any], mine: Any, within: dist.ProcessGroup | None = None) -> None:
        parts: list[Any] = [None] * dist.get_world_size(within or group)
        original(parts, mine, group=within or group)
        found[:] = parts

    dist.all_gather_object = gather  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.all_gather_object = original


@contextlib.contextmanager
def nccl_ep_starts_for(topk: int | None) -> Iterator[None]:
    """NCCL EP starts for tokens of `topk` experts; with None nothing changes.

    Transformer Engine 2.19 and newer ask for it at the start. Megatron-Core 0.19.2, which was written for 2.18, does
    not pass it on (`ensure_nccl_ep_bootstrapped` in fused_a2a.py).
    """
    if topk is None:
        yield
        return
    library: Any = importlib.import_module("transformer_engine.pytorch.ep")
    start = library.ep_bootstrap
    if "num_topk" in inspect.signature(start).parameters:
        start = functools.partial(start, num_topk=topk)
    with patch.object(library, "ep_bootstrap", start):
        yield


@contextlib.contextmanager
def unforced_routing(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Routers choose experts by their scores, also where the config has them draw experts at random."""
    configs: dict[int, Any] = {
        id(module.config): module.config
        for chunk in chunks
        for module in chunk.modules()
        if getattr(getattr(module, "config", None), "moe_router_force_load_balancing", False)
    }
    for config in configs.values():
        config.moe_router_force_load_balancing = False
    try:
        yield
    finally:
        for config in configs.values():
            config.moe_router_force_load_balancing = True
