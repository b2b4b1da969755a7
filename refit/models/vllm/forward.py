"""A forward pass over the parameters of an engine, in plain torch: what the fused layout means.

It uses each tensor as vLLM's layer of that name does (`QKVParallelLinear`, `MergedColumnParallelLinear`, `FusedMoE`,
`MultiHeadLatentAttentionWrapper`), with attention written out. A wrong order within a fused tensor, a wrong cut or a
wrong expert in a slot changes the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from refit.config.shape import (
    GEGLU_LIMIT,
    GEGLU_OFFSET,
    ROTARY_BASE,
    Experts,
    LatentAttention,
    ModelShape,
)
from refit.models.attention_sinks import attention_with_sinks
from refit.models.forward_pass import ForwardPass, Routing, Trace
from refit.models.norm_of_parts import norm_of_parts
from refit.models.vllm.delta_net import through_delta_net
from refit.models.vllm.groups import Groups
from refit.predict.expert_slots import Slots
from refit.predict.vllm.engine import Engine
from refit.predict.vllm.parameters import Engines


@dataclass(frozen=True, slots=True)
class ReferenceForward:
    """One rank's part of a forward pass. Collective: every rank of an engine calls, with the same tokens."""

    shape: ModelShape
    engines: Engines
    groups: Groups
    parameters: Mapping[str, torch.Tensor]
    trace: Trace

    @property
    def engine(self) -> Engine:
        return self.engines.engine

    def run(self, tokens: torch.Tensor) -> ForwardPass:
        """The pass of `tokens` `[batch, sequence]`. A pass has an object of its own."""
        return self.trace.ended(self._logits(tokens))

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """`[batch, sequence, vocab_size]` in float32 for `tokens` `[batch, sequence]`; None before the last stage."""
        some = next(iter(self.parameters.values()))
        tokens = tokens.to(some.device)
        hidden = self._embedded(tokens) if self.groups.previous is None else self._received(tokens, some)
        for number in self.engines.stages[self.groups.place.stage]:
            hidden = self._layer(number, self.trace.reached(number, hidden))
        if self.groups.next is not None:
            dist.send(hidden.contiguous(), dst=self.groups.next)
            return None
        hidden = self._norm("model.norm.weight", self.trace.reached(self.shape.num_layers, hidden))
        name = self._engine_name("model.embed_tokens.weight") if self.shape.tied_embeddings else "lm_head.weight"
        part = F.linear(hidden, self.parameters[name]).float()
        parts = [torch.empty_like(part) for _ in range(self.engine.tp)]
        dist.all_gather(parts, part, group=self.groups.tp)
        return torch.cat(parts, dim=-1)[..., : self.shape.vocab_size]

    def _received(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        dtype = self.parameters[f"{self._first_layer()}input_layernorm.weight"].dtype
        hidden = torch.empty((*tokens.shape, self.shape.hidden_size), dtype=dtype, device=like.device)
        dist.recv(hidden, src=self.groups.previous)
        return hidden

    def _engine_name(self, name: str) -> str:
        return self.engines.model.family.engine_name(name)

    def _first_layer(self) -> str:
        name = next(name for name in self.parameters if name.startswith("model.layers."))
        return ".".join(name.split(".")[:3]) + "."

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.parameters[self._engine_name("model.embed_tokens.weight")]
        local = tokens - self.groups.place.tp * weight.size(0)
        outside = (local < 0) | (local >= weight.size(0))
        found = F.embedding(local.masked_fill(outside, 0), weight).masked_fill(outside[..., None], 0)
        return self._summed(found, self.groups.tp)

    def _summed(self, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        part = part.contiguous()
        dist.all_reduce(part, group=group)
        return part

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.parameters[name].float() + self.shape.norms_add_one
        return F.rms_norm(hidden.float(), (weight.size(0),), weight, self.shape.norm_epsilon).to(hidden.dtype)

    def _linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def _layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{number}."
        normed = self._norm(f"{prefix}input_layernorm.weight", hidden)
        if self.shape.kinds[number].delta_net:
            part = through_delta_net(self.shape, self.engine.tp, f"{prefix}linear_attn.", self.parameters, normed)
            hidden = hidden + self._summed(part, self.groups.tp)
        else:
            attention = f"{prefix}{self._engine_name('self_attn.')}"
            attended = self._attention(number, attention, normed)
            projected = self._summed(F.linear(attended, self.parameters[f"{attention}o_proj.weight"]), self.groups.tp)
            bias = self.parameters.get(f"{attention}o_proj.bias")
            hidden = hidden + (projected if bias is None else projected + bias)
        normed = self._norm(f"{prefix}post_attention_layernorm.weight", hidden)
        if number in self.engines.placed:
            return hidden + self._mixture(number, normed)
        return hidden + self._summed(self._mlp(f"{prefix}mlp.", normed), self.groups.tp)

    # --- Attention ----------------------------------------------------------------------------------------------

    def _attention(self, number: int, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
        """The heads of this rank, `[batch, sequence, heads * width]`."""
        split = self._grouped_queries if self.shape.mla is None else self._latent
        query, key, value, *gate = split(prefix, hidden)
        if self.shape.attention_sinks:
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            found = attention_with_sinks(query, key, value, self.parameters[f"{prefix}sinks"], number)
            return found.transpose(1, 2).flatten(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * query.size(-1) ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        found = torch.einsum("bhqk,bkhd->bqhd", weights, value.float())
        return (found * gate[0].sigmoid() if gate else found).flatten(2).to(hidden.dtype)

    def _grouped_queries(self, prefix: str, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = self.shape.kv_channels
        heads = self.shape.num_attention_heads // self.engine.tp
        groups = max(1, self.shape.num_query_groups // self.engine.tp)
        fused = self._linear(f"{prefix}qkv_proj", hidden)
        width = heads * size * (1 + self.shape.attention_output_gate)
        parts = fused.tensor_split([width, width + groups * size], dim=-1)
        if self.shape.qk_norm_over_heads:
            weights = (self.parameters[f"{prefix}{name}_norm.weight"] for name in ("q", "k"))
            normed = (norm_of_parts(part, weight, self.groups.tp) for part, weight in zip(parts, weights, strict=False))
            parts = (*normed, parts[2])
        query, key, value = (_by_head(part, part.size(-1) // size) for part in parts)
        gate = []
        if self.shape.attention_output_gate:  # of each head, behind its query
            query, gate = query[:, :, 0::2], [query[:, :, 1::2]]
        if self.shape.qk_layernorm and not self.shape.qk_norm_over_heads:
            query = self._norm(f"{prefix}q_norm.weight", query)
            key = self._norm(f"{prefix}k_norm.weight", key)
        query, key = _rotated(query), _rotated(key)
        return query, *(part.repeat_interleave(heads // groups, dim=2) for part in (key, value)), *gate

    def _latent(self, prefix: str, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mla, heads = self.shape.mla, self.shape.num_attention_heads // self.engine.tp
        assert mla is not None
        query, latent = self._projected_down(prefix, hidden, mla)
        compressed, key_position = latent.tensor_split([mla.kv_lora_rank], dim=-1)
        up = self._linear(f"{prefix}kv_b_proj", self._norm(f"{prefix}kv_a_layernorm.weight", compressed))
        key, value = _by_head(up, heads).tensor_split([mla.qk_head_dim], dim=-1)
        query, query_position = _by_head(query, heads).tensor_split([mla.qk_head_dim], dim=-1)
        key_position = _rotated(_deinterleaved(key_position[:, :, None])).expand(-1, -1, heads, -1)
        query_position = _rotated(_deinterleaved(query_position))
        return torch.cat([query, query_position], dim=-1), torch.cat([key, key_position], dim=-1), value

    def _projected_down(
        self, prefix: str, hidden: torch.Tensor, mla: LatentAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's queries, and the latent keys and values with their rotary part."""
        if mla.q_lora_rank is None:
            return self._linear(f"{prefix}q_proj", hidden), self._linear(f"{prefix}kv_a_proj_with_mqa", hidden)
        down, latent = self._linear(f"{prefix}fused_qkv_a_proj", hidden).tensor_split([mla.q_lora_rank], dim=-1)
        normed = self._norm(f"{prefix}q_a_layernorm.weight", down)
        return self._linear(f"{prefix}q_b_proj", normed), latent

    # --- MLPs ---------------------------------------------------------------------------------------------------

    def _mlp(self, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
        """The part of this rank, before the sum over TP."""
        return self._linear(f"{prefix}down_proj", _gated(self._linear(f"{prefix}gate_up_proj", hidden)))

    def _mixture(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        experts, slots = self.shape.experts, self.engines.placed[number]
        prefix = f"model.layers.{number}.{self.engines.model.family.published_name('mlp.')}"
        assert experts is not None
        flat = hidden.flatten(0, 1)
        scores, chosen, weights = self._routing(prefix, flat, experts)
        self.trace.routing[number] = Routing(*(each.view(*hidden.shape[:2], -1) for each in (scores, chosen)))
        found = self._summed(self._local_experts(prefix, flat, weights, slots), self.groups.experts).view_as(hidden)
        if experts.shared_ffn_hidden_size is not None:
            shared = self._mlp(prefix + ("shared_expert." if experts.shared_gate else "shared_experts."), hidden)
            if experts.shared_gate:
                shared = shared * self._linear(f"{prefix}shared_expert_gate", hidden).sigmoid()
            found = found + (shared if self.engine.replicates_shared_experts else self._summed(shared, self.groups.tp))
        return found

    def _routing(self, prefix: str, hidden: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, ...]:
        """The scores by which experts are chosen, which are chosen, and the weight of every expert, 0 where it is not:
        for every token, all `[tokens, num_experts]`."""
        router = prefix + next(name for name in ("gate", "router") if f"{prefix}{name}.weight" in self.parameters)
        bias = self.parameters.get(f"{router}.bias")
        weight = self.parameters[f"{router}.weight"].float()
        logits = F.linear(hidden.float(), weight, None if bias is None else bias.float())
        if experts.expert_bias:
            probabilities = logits.sigmoid()
            names = (f"{prefix}{module}e_score_correction_bias" for module in ("gate.", ""))
            scores = probabilities + next(self.parameters[name] for name in names if name in self.parameters)
        else:
            probabilities, scores = logits.softmax(dim=-1), logits
        index = scores.topk(experts.topk, dim=-1).indices
        kept = probabilities.gather(-1, index)
        if experts.topk > 1 and not self.shape.softmax_over_all:
            kept = kept / kept.sum(dim=-1, keepdim=True)
        zeros = torch.zeros_like(logits)
        return scores, zeros.scatter(-1, index, 1) > 0, zeros.scatter(-1, index, kept)

    def _local_experts(self, prefix: str, hidden: torch.Tensor, weights: torch.Tensor, slots: Slots) -> torch.Tensor:
        """What the slots of this rank add. Of several copies of an expert, token `t` goes to number `t % copies`."""
        run = self._clamped_expert if self.shape.quick_geglu else self._expert
        rank = self.groups.place.expert if self.engine.ep > 1 else 0
        holders = [(expert, other) for other, held in enumerate(slots) for expert in held]
        result = torch.zeros_like(hidden)
        for slot, expert in enumerate(slots[rank]):
            copies = [other for held, other in holders if held == expert]
            turn = torch.arange(hidden.size(0), device=hidden.device) % len(copies) == copies.index(rank)
            tokens = torch.nonzero(turn & (weights[:, expert] > 0)).flatten()
            out = run(f"{prefix}experts.routed_experts.", slot, hidden[tokens])
            result.index_add_(0, tokens, (out.float() * weights[tokens, expert, None]).to(out.dtype))
        return result

    def _expert(self, prefix: str, slot: int, hidden: torch.Tensor) -> torch.Tensor:
        first, second = (self.parameters[f"{prefix}{name}_weight"] for name in ("w13", "w2"))
        return F.linear(_gated(F.linear(hidden, first[slot])), second[slot])

    def _clamped_expert(self, prefix: str, slot: int, hidden: torch.Tensor) -> torch.Tensor:
        """With biases, and rows of gate and up in turn."""
        names = ("w13_weight", "w13_bias", "w2_weight", "w2_bias")
        first, first_bias, second, second_bias = (self.parameters[f"{prefix}{name}"][slot] for name in names)
        both = F.linear(hidden, first, first_bias)
        gate, up = both[..., 0::2].clamp(max=GEGLU_LIMIT), both[..., 1::2].clamp(-GEGLU_LIMIT, GEGLU_LIMIT)
        return F.linear(gate * torch.sigmoid(1.702 * gate) * (up + GEGLU_OFFSET), second, second_bias)


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def _deinterleaved(heads: torch.Tensor) -> torch.Tensor:
    """DeepSeek's rotary pairs are neighbours: put the first of all pairs before the second of all."""
    return heads.reshape(*heads.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


def _by_head(columns: torch.Tensor, heads: int) -> torch.Tensor:
    """`[batch, sequence, heads * width]` as `[batch, sequence, heads, width]`."""
    return columns.reshape(*columns.shape[:-1], heads, -1)


def _rotated(heads: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[batch, sequence, heads, width]`, positions from 0, pairs half a width apart."""
    width = heads.size(-1)
    powers = torch.arange(0, width, 2, device=heads.device, dtype=torch.float32) / width
    angles = torch.arange(heads.size(1), device=heads.device, dtype=torch.float32)[:, None] / ROTARY_BASE**powers
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (angles.cos(), angles.sin()))
    first, second = heads.float().chunk(2, dim=-1)
    return (heads.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)
