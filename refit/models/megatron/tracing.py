"""What a forward pass that is compared with another's needs of Megatron's model: its layers' states, its routers'
choices, and a dispatcher that sends float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

from refit.models.forward_pass import Routing, Trace
from refit.models.megatron.build import BuiltModel


@contextmanager
def traced(model: BuiltModel, trace: Trace, shape: torch.Size) -> Iterator[None]:
    """Passes within this context fill `trace`, and compute with the states that it replays. `shape` is `[batch,
    sequence]`.

    Each rank has the layers of its own stages, for the whole sequence, of which it runs a part under sequence
    parallelism.
    """
    sequence = _Sequence(shape[1], model.groups.tp)
    with ExitStack() as stack:
        for module, number in _entered(model):
            handle = module.register_forward_pre_hook(_entering(trace, number, sequence), with_kwargs=True)
            stack.callback(handle.remove)
        for layer in _moe_layers(model):
            layer.router.routing = _observing(layer.router, trace, sequence, shape[0])
            stack.callback(delattr, layer.router, "routing")
        yield


def _entered(model: BuiltModel) -> Iterator[tuple[Any, int]]:
    """This rank's layers, and the norm behind the last one, each with its number."""
    for chunk in model.chunks:
        decoder: Any = chunk.decoder
        for layer in decoder.layers:
            yield layer, layer.layer_number - 1
        if decoder.final_layernorm is not None:
            yield decoder.final_layernorm, decoder.config.num_layers


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens `[sequence, batch, ...]`, as Megatron has them: whole, or split over `tp`."""

    length: int
    tp: dist.ProcessGroup

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, ...]`."""
        if part.size(0) < self.length:
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.tp))]
            dist.all_gather(parts, part.contiguous(), group=self.tp)
            part = torch.cat(parts)
        return part.transpose(0, 1)

    def part(self, whole: torch.Tensor, size: int) -> torch.Tensor:
        """This rank's `size` tokens of each sequence of `whole` `[batch, sequence, ...]`."""
        begin = dist.get_rank(self.tp) * size if size < self.length else 0
        return whole[:, begin : begin + size].transpose(0, 1).contiguous()


def _entering(trace: Trace, number: int, sequence: _Sequence) -> Callable[..., Any]:
    def enter(_: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden = arguments[0] if arguments else options["hidden_states"]
        replayed = sequence.part(trace.reached(number, sequence.whole(hidden)), hidden.size(0))
        return ((replayed, *arguments[1:]), options) if arguments else ((), {**options, "hidden_states": replayed})

    return enter


def _observing(router: Any, trace: Trace, sequence: _Sequence, batch: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The router's own method `routing`, which gets logits `[sequence, batch, num_experts]`."""
    choose = router.routing

    def routing(logits: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        weights, chosen = choose(logits, *arguments, **options)
        scores = logits.float().view(-1, batch, logits.size(-1))
        if router.score_function == "sigmoid":
            scores = scores.sigmoid()
            scores = scores if router.expert_bias is None else scores + router.expert_bias
        mask = chosen.view(scores.shape).to(scores.dtype)
        trace.routing[router.layer_number - 1] = Routing(sequence.whole(scores), sequence.whole(mask) > 0)
        return weights, chosen

    return routing


@contextmanager
def gathering_dispatch(model: BuiltModel) -> Iterator[None]:
    """Every MoE layer gathers all tokens for its experts, whichever dispatcher the model trains with."""
    with ExitStack() as stack:
        for layer in _moe_layers(model):
            if isinstance(layer.token_dispatcher, MoEAllGatherTokenDispatcher):
                continue
            stack.callback(setattr, layer, "token_dispatcher", layer.token_dispatcher)
            layer.token_dispatcher = MoEAllGatherTokenDispatcher(
                layer.num_local_experts, layer.local_expert_indices, config=layer.config, pg_collection=model.groups
            )
        yield


def _moe_layers(model: BuiltModel) -> list[Any]:
    """Those of the decoder: multi-token prediction does not take part."""
    decoders: list[Any] = [chunk.decoder for chunk in model.chunks]
    return [module for decoder in decoders for module in decoder.modules() if isinstance(module, MoELayer)]
