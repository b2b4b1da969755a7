"""A gated delta net over an engine's parameters, in plain torch, token by token (arXiv:2412.06464, equation 10)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from refit.config.shape import ModelShape


def through_delta_net(
    shape: ModelShape, tp: int, prefix: str, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """What this rank's heads add to `hidden` `[batch, sequence, hidden]`, before the sum over TP."""
    net = shape.delta_net
    assert net is not None
    key_heads, each = net.num_key_heads // tp, net.num_value_heads // net.num_key_heads
    values = each * net.value_head_dim
    fused = _by_head(F.linear(hidden, parameters[f"{prefix}in_proj_qkvz.weight"]), key_heads)
    sizes = [net.key_head_dim, net.key_head_dim, values, values]
    query, key, value, gate = (part.flatten(2) for part in torch.split(fused, sizes, dim=-1))
    rates = _by_head(F.linear(hidden, parameters[f"{prefix}in_proj_ba.weight"]), key_heads)
    beta, alpha = (part.flatten(2).float() for part in torch.split(rates, each, dim=-1))
    mixed = _convolved(torch.cat([query, key, value], dim=-1), parameters[f"{prefix}conv1d.weight"])
    query, key, value = torch.split(mixed.float(), [part.size(-1) for part in (query, key, value)], dim=-1)
    query, key = (_normalised(_by_head(part, key_heads)).repeat_interleave(each, dim=2) for part in (query, key))
    decay = -parameters[f"{prefix}A_log"].float().exp() * F.softplus(alpha + parameters[f"{prefix}dt_bias"].float())
    value = _by_head(value, key_heads * each)
    found = _recurrent(query * net.key_head_dim**-0.5, key, value, decay.exp(), beta.sigmoid())
    normed = F.rms_norm(
        found, (net.value_head_dim,), parameters[f"{prefix}norm.weight"].float(), shape.norm_epsilon
    ).to(hidden.dtype)
    gated = normed * F.silu(_by_head(gate, key_heads * each).float())
    return F.linear(gated.flatten(2).to(hidden.dtype), parameters[f"{prefix}out_proj.weight"])


def _by_head(columns: torch.Tensor, heads: int) -> torch.Tensor:
    """`[batch, sequence, heads * width]` as `[batch, sequence, heads, width]`."""
    return columns.reshape(*columns.shape[:-1], heads, -1)


def _normalised(heads: torch.Tensor) -> torch.Tensor:
    """Of length 1, as flash-linear-attention's `l2norm` has it."""
    return heads * torch.rsqrt((heads * heads).sum(-1, keepdim=True) + 1e-6)


def _convolved(mixed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`mixed` `[batch, sequence, channels]` with `weight` `[channels, 1, tokens]`: a token and those before it."""
    padded = F.pad(mixed.transpose(1, 2), (weight.size(-1) - 1, 0))
    return F.silu(F.conv1d(padded, weight, groups=weight.size(0))).transpose(1, 2)


def _recurrent(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Of `[batch, sequence, heads, width]`; `decay` and `beta` have no width."""
    state = key.new_zeros(key.size(0), key.size(2), key.size(3), value.size(3))
    found = []
    for token in range(key.size(1)):
        state = state * decay[:, token, :, None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, key[:, token])
        change = (value[:, token] - known) * beta[:, token, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, token], change)
        found.append(torch.einsum("bhkv,bhk->bhv", state, query[:, token]))
    return torch.stack(found, dim=1)
