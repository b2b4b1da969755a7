"""One forward pass of a built model, for comparing the logits of both sides."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from refit.errors import RefitError, UnavailableError
from refit.models.megatron import compat
from refit.models.megatron.build import BuiltModel


def check_forward_possible(model: BuiltModel) -> None:
    """Raise UnavailableError, the same on every rank of the layout, where this version cannot run this model
    forward."""
    if len(model.chunks) != 1:
        raise UnavailableError(
            f"no forward check with {len(model.chunks)} model chunks per rank: only one is supported"
        )
    shape, tp = model.shape, model.layout.tp
    if shape is None or shape.mla is not None or shape.num_query_groups >= tp:
        return
    if compat.megatron_version() < (0, 19):
        raise UnavailableError(
            f"no forward check: Megatron-Core {'.'.join(map(str, compat.megatron_version()))} cannot run "
            f"{shape.num_query_groups} query groups on TP {tp} without its global process groups (0.19 can)"
        )


def forward_logits(model: BuiltModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits `[batch, sequence, vocab_size]` in float32 for `tokens` `[batch, sequence]`, on the last stage; else None.

    Vocabulary padding is removed, so that layouts compare. Attention is causal, positions start at 0.
    Collective: every rank of the model's layout must call, with the same tokens. Raises UnavailableError where this
    model cannot run forward here (`check_forward_possible`), RefitError where it fails.
    """
    check_forward_possible(model)
    try:
        with torch.no_grad(), compat.ready_to_forward(model.groups, model.device):
            output = _forward(model, tokens.to(model.device))
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise RefitError(f"the forward pass failed: {type(error).__name__}: {error}") from error
    if output is None:
        return None
    vocab_size = output.size(-1) if model.shape is None else model.shape.vocab_size
    return output[..., :vocab_size].float()


def _forward(model: BuiltModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """Stage after stage: receive hidden states `[sequence, batch, hidden]`, run this stage, send its output on."""
    module, pipeline = model.module, dist.get_process_group_ranks(model.groups.pp)
    config: Any = module.config
    stage = pipeline.index(dist.get_rank())
    if stage > 0:
        shape = (tokens.size(1), tokens.size(0), config.hidden_size)
        hidden = torch.empty(shape, dtype=config.params_dtype, device=model.device)
        dist.recv(hidden, src=pipeline[stage - 1], group=model.groups.pp)
        module.set_input_tensor(hidden)  # type: ignore[operator]
    positions = torch.arange(tokens.size(1), device=model.device).expand_as(tokens)
    output: torch.Tensor = module(tokens, positions, None)
    if stage == len(pipeline) - 1:
        return output
    dist.send(output.contiguous(), dst=pipeline[stage + 1], group=model.groups.pp)
    return None
