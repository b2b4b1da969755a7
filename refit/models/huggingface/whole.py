"""A whole model of transformers on one process: a reference for what an engine computes, and a checkpoint for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers

from refit.config.layout import Layout
from refit.config.shape import Dtype, ModelShape
from refit.config.side import DEFAULT_ATTN_IMPL, SideSpec
from refit.memory.weights import assembled
from refit.models.forward_pass import Routing, Trace
from refit.models.huggingface.model import compute_rotary_buffers, materialise, meta_model
from refit.models.huggingface.tracing import plain_kernels, traced
from refit.models.huggingface.weights import read_weights, whole
from refit.predict.families.names import named_model


@dataclass(frozen=True, slots=True)
class WholePass:
    """`logprobs` `[tokens, vocabulary]` of what follows each token. `gap` `[tokens]`: by how much routers prefer the
    least of a token's experts to the best of all others, in the layer where that is least, as a share of the layer's
    largest score; infinity without experts."""

    logprobs: torch.Tensor
    gap: torch.Tensor


class WholeModel:
    """`weights` are its parameters as shards of the logical tensors, uninitialised at first."""

    title = f"transformers {transformers.__version__}"

    def __init__(self, shape: ModelShape, dtype: Dtype, device: torch.device) -> None:
        named = named_model(shape, dtype)
        side = SideSpec(Layout(1, 1, 1, 1, world_size=1), format="fsdp2", dtype=dtype, attn_impl=DEFAULT_ATTN_IMPL)
        self._model = meta_model(shape, named, side)
        materialise(self._model, device)
        compute_rotary_buffers(self._model, device)
        self._model.eval()
        self._device, self._published = device, named_model(shape, dtype, single_experts=True)
        self.weights = read_weights(self._model, named, lambda _, tensor: whole(tensor))

    def pass_of(self, tokens: Sequence[int]) -> WholePass:
        trace, ids = Trace(), torch.tensor([list(tokens)], device=self._device)
        with torch.no_grad(), plain_kernels(self._model.config), traced(self._model, trace, ids.shape):
            logits: torch.Tensor = self._model(input_ids=ids).logits[0]
        gaps = [_gap(routing)[0].cpu() for routing in trace.routing.values()]
        gap = torch.stack(gaps).amin(0) if gaps else torch.full((len(tokens),), torch.inf)
        return WholePass(torch.log_softmax(logits.float(), dim=-1).cpu(), gap)

    def checkpoint(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as published checkpoints have them: expert by expert, gate and up apart, tied ones once."""
        state = self._model.state_dict()
        for block in self._published.blocks:
            for tensor in block.tensors:
                if any(piece.axes is not None for piece in tensor.pieces):  # published as transformers has it
                    yield block.prefix + tensor.name, state[block.prefix + tensor.name]
                    continue
                parts = [assembled(self.weights, block.key_prefix + each.key, each.box) for each in tensor.pieces]
                pieces = zip(parts, tensor.pieces, strict=True)
                yield block.prefix + tensor.name, torch.cat([part.view(each.held.extents) for part, each in pieces])


def _gap(routing: Routing) -> torch.Tensor:
    """`[batch, sequence]`."""
    chosen = routing.scores.masked_fill(~routing.chosen, torch.inf).amin(-1)
    others = routing.scores.masked_fill(routing.chosen, -torch.inf).amax(-1)
    return (chosen - others) / routing.scores.abs().max()
