"""What a forward pass that is compared with another's needs of a transformers model: its layers' states, its routers'
choices, and kernels that take float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from refit.models.forward_pass import Routing, Trace
from refit.models.huggingface.expert_bias import BIAS


@contextmanager
def traced(model: Any, trace: Trace, shape: torch.Size) -> Iterator[None]:
    """Passes within this context fill `trace`, and compute with the states that it replays. `shape` is `[batch,
    sequence]`. The router of a layer, `mlp.gate` or `mlp.router`, gives its logits, the weights of the chosen experts,
    and which they are, in all families that have one."""
    decoder = model.model
    with ExitStack() as stack:
        for number, module in enumerate([*decoder.layers, decoder.norm]):
            handle = module.register_forward_pre_hook(_entering(trace, number), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            mlp = getattr(module, "mlp", None)
            router = getattr(mlp, "gate", getattr(mlp, "router", None))
            if router is not None:
                bias = getattr(router, BIAS, getattr(mlp, BIAS, None))
                stack.callback(router.register_forward_hook(_observing(trace, number, shape, bias)).remove)
        yield


def _entering(trace: Trace, number: int) -> Any:
    def enter(_: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden, *others = arguments
        return (trace.reached(number, hidden), *others), options

    return enter


def _observing(trace: Trace, number: int, shape: torch.Size, bias: torch.Tensor | None) -> Any:
    def observe(_: torch.nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, index = output[0], output[2]
        scores = logits.float()
        if bias is not None:
            scores = scores.sigmoid() + bias
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        trace.routing[number] = Routing(scores.view(*shape, -1), chosen.view(*shape, -1))

    return observe


@contextmanager
def plain_kernels(config: Any) -> Iterator[None]:
    """Passes within this context use no kernel that takes 16 bits only: FlashAttention and grouped products on GPUs."""
    before = config._attn_implementation, config._experts_implementation
    if config._attn_implementation == "flash_attention_2":
        config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = before
