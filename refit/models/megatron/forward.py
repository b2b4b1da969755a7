"""Forward passes of a built model: for comparing the logits of both sides, and to be timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from refit.errors import RefitError
from refit.models.float32 import computing_in_float32
from refit.models.forward_pass import ForwardPass, Trace
from refit.models.megatron import compat, compat_steps
from refit.models.megatron.build import BuiltModel
from refit.models.megatron.tracing import gathering_dispatch, traced
from refit.models.micro_batches import replica_part


def forward_pass(
    model: BuiltModel, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None
) -> ForwardPass:
    """Run `tokens` `[batch, sequence]` forward in float32, as `ShardedModel.forward`; logits are on the last stage.

    Vocabulary padding is removed, so that layouts compare. Attention is causal, positions start at 0. Routing is the
    router's own; tokens are gathered for the experts, since other dispatchers may send 16 bits only. Multi-token
    prediction layers do not take part. Collective: every rank of the model's layout must call, with the same tokens.
    Raises RefitError where it fails.
    """
    # A model of this suite leaves its logits in parts, as training wants them. A provider's may take no such option.
    options = {} if model.shape is None else {"runtime_gather_output": True}
    trace = Trace(replayed)
    with (
        compat_steps.unforced_routing(model.chunks),
        computing_in_float32(model.chunks),
        gathering_dispatch(model),
        traced(model, trace, tokens.shape),
    ):
        output = _run(model, tokens, options, torch.float32)
    if output is None:
        return trace.ended(None)
    vocab_size = output.size(-1) if model.shape is None else model.shape.vocab_size
    return trace.ended(output[..., :vocab_size])


def run_forward(model: BuiltModel, tokens: torch.Tensor) -> None:
    """Run `tokens` `[batch, sequence]` forward, each data-parallel replica its part. Logits stay in parts.

    Collective: every rank of the model's layout must call, with the same tokens. Raises RefitError where it fails.
    """
    config: Any = model.chunks[0].config
    _run(model, replica_part(tokens, model.layout), {}, config.params_dtype)


def _run(
    model: BuiltModel, tokens: torch.Tensor, options: dict[str, Any], hidden_dtype: torch.dtype
) -> torch.Tensor | None:
    """Run forward; between stages, hidden states are sent in `hidden_dtype`."""
    try:
        with (
            torch.no_grad(),
            compat.running_on(model.groups, model.device, len(model.chunks)),
            compat_steps.trainable_on(model.device),
            compat_steps.uncompiled_on(model.device),
        ):
            return _forward(model, tokens.to(model.device), options, hidden_dtype)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise RefitError(f"the forward pass failed: {type(error).__name__}: {error}") from error


def _forward(
    model: BuiltModel, tokens: torch.Tensor, options: dict[str, Any], hidden_dtype: torch.dtype
) -> torch.Tensor | None:
    """Chunk after chunk, and in each pass stage after stage: the output of the last chunk on the last stage."""
    output = None
    for number in range(len(model.chunks)):
        output = _forward_chunk(model, number, tokens, options, hidden_dtype)
    return output


def _forward_chunk(
    model: BuiltModel, number: int, tokens: torch.Tensor, options: dict[str, Any], hidden_dtype: torch.dtype
) -> torch.Tensor | None:
    """Receive hidden states `[sequence, batch, hidden]` unless this is the first chunk, run it, send its output on."""
    chunk: Any = model.chunks[number]
    pipeline = dist.get_process_group_ranks(model.groups.pp)
    stage, last = pipeline.index(dist.get_rank()), len(pipeline) - 1
    if (stage, number) != (0, 0):
        parts = model.layout.tp if chunk.config.sequence_parallel else 1
        shape = (tokens.size(1) // parts, tokens.size(0), chunk.config.hidden_size)
        hidden = torch.empty(shape, dtype=hidden_dtype, device=model.device)
        dist.recv(hidden, src=pipeline[stage - 1], group=model.groups.pp)
        chunk.set_input_tensor(hidden)
    positions = torch.arange(tokens.size(1), device=model.device).expand_as(tokens)
    with compat.without_token_prediction(chunk):
        output: torch.Tensor = chunk(tokens, positions, None, **options)
    if (stage, number) == (last, len(model.chunks) - 1):
        return output
    dist.send(output.contiguous(), dst=pipeline[(stage + 1) % len(pipeline)], group=model.groups.pp)
    return None
