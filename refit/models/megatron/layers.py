"""Modules that Megatron's local layer spec lacks on CPUs: core attention, grouped experts, latent projections; and
norms over all heads, which no layer spec has.

The experts hold parameters exactly as Megatron's Transformer Engine modules do; the attention has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank, get_pg_size

from refit.models.attention_sinks import attention_with_sinks
from refit.models.megatron.compat import mark_grouped_weight
from refit.models.norm_of_parts import norm_of_parts


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal scaled dot-product attention, for grouped-query and latent attention alike. Its only parameters are sinks,
    where the model has some, named, cut and marked as those of Megatron's DotProductAttention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *_: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.tp_group = getattr(pg_collection, "tp", None)
        latent = getattr(config, "multi_latent_attention", False)
        self.num_shared = config.qk_pos_emb_head_dim if latent and config.tensor_model_parallel_size > 1 else 0
        self.softmax_offset, self.layer = None, layer_number - 1
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, **where))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`query` is `[sequence, batch, heads, size]`, `key` and `value` have as many heads or fewer.

        Returns `[sequence, batch, hidden]`.
        """
        if self.num_shared and key.requires_grad:
            own, shared = key[..., : -self.num_shared], key[..., -self.num_shared :]
            summed: torch.Tensor = _SharedKey.apply(shared, self.tp_group)  # type: ignore[no-untyped-call]
            key = torch.cat([own, summed], dim=-1)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if k.size(1) != q.size(1):
            repeats = q.size(1) // k.size(1)
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        if self.softmax_offset is not None:
            found = attention_with_sinks(q, k, v, self.softmax_offset, self.layer).permute(2, 0, 1, 3)
            return found.reshape(found.size(0), found.size(1), -1)
        # Fused kernels want values as wide as queries; latent attention's are narrower. Zeros change no result.
        width = v.size(-1)
        v = F.pad(v, (0, q.size(-1) - width))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        output = output[..., :width].permute(2, 0, 1, 3)
        return output.reshape(output.size(0), output.size(1), -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        if self.softmax_offset is None:
            return {}
        stated: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return stated


class _SharedKey(torch.autograd.Function):
    """The part of latent attention's keys that all heads share, `[sequence, batch, heads, size]`, one copy per head.

    Its gradient is the sum over the heads of all tensor-parallel ranks. With the local layer spec Megatron sums over
    the rank's own heads only (multi_latent_attention.py, 0.16.1 and 0.19.2), so the other ranks' are added here.
    """

    @staticmethod
    def forward(ctx: Any, shared: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.mean(dim=2, keepdim=True)  # what follows sums over this rank's heads
        dist.all_reduce(total, group=ctx.group)
        return total.expand_as(gradient), None


class DuplicatedLinear(torch.nn.Linear):
    """A linear that every rank holds whole, as Transformer Engine's with `parallel_mode="duplicated"`."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool, **_: Any) -> None:
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        super().__init__(input_size, output_size, bias=bias, **where)

    def reset_parameters(self) -> None:
        """Weights stay as allocated, as all of a built model's."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(hidden), None


class NormOverHeads(torch.nn.Module):
    """An RMS norm of queries or keys over all heads together, of which each tensor-parallel rank has some.

    Megatron-Core's run over single heads. Name, weight and cut are those that Megatron-Bridge gives MiniMax-M2's
    (`FullDimQNorm`, models/minimax_m2). The mean is that of all ranks.
    """

    num_heads = ""

    def __init__(self, hidden_size: int, config: Any, **_: Any) -> None:
        super().__init__()
        width = getattr(config, self.num_heads) * hidden_size // config.tensor_model_parallel_size
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(width, **where))
        vars(self.weight).update(tensor_model_parallel=True, partition_dim=0, partition_stride=1)
        self.group = parallel_state.get_tensor_model_parallel_group()

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """`heads` `[sequence, batch, heads, size]`, those of this rank."""
        return norm_of_parts(heads.flatten(2), self.weight, self.group).view_as(heads)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        stated: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return stated


class QueryNorm(NormOverHeads):
    num_heads = "num_attention_heads"


class KeyNorm(NormOverHeads):
    num_heads = "num_query_groups"


class GroupedLinear(torch.nn.Module):
    """One linear of this rank's experts: `weight0 .. weight{n-1}` and biases, named as in TE's GroupedLinear."""

    def __init__(self, num_experts: int, rows: int, columns: int, config: Any, row_parallel: bool) -> None:
        super().__init__()
        self.row_parallel = row_parallel
        # The device on which Megatron allocates.
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        for index in range(num_experts):
            weight = torch.nn.Parameter(torch.empty(rows, columns, **where))
            mark_grouped_weight(weight, config, row_parallel)
            self.register_parameter(f"weight{index}", weight)
            if config.add_bias_linear:
                self.register_parameter(f"bias{index}", torch.nn.Parameter(torch.empty(rows, **where)))

    def parts(self, index: int) -> dict[str, torch.nn.Parameter]:
        """`weight` and, where there is one, `bias` of expert `index` of this rank."""
        names = {name: getattr(self, f"{name}{index}", None) for name in ("weight", "bias")}
        return {name: part for name, part in names.items() if part is not None}


class GroupedExperts(MegatronModule):  # type: ignore[misc]
    """This rank's routed experts, with the names and boxes of Megatron's TEGroupedMLP, computed one by one."""

    def __init__(self, num_local_experts: int, config: Any, *_: Any, pg_collection: Any = None, **__: Any) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.groups = pg_collection
        ffn = config.moe_ffn_hidden_size // get_pg_size(pg_collection.expt_tp)
        first = 2 * ffn if config.gated_linear_unit else ffn
        width = config.moe_latent_size or config.hidden_size
        self.linear_fc1 = GroupedLinear(num_local_experts, first, width, config, row_parallel=False)
        self.linear_fc2 = GroupedLinear(num_local_experts, width, ffn, config, row_parallel=True)

    def forward(
        self, hidden: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """`hidden` `[tokens, hidden]` sorted by expert, `probs` `[tokens]`: weighted outputs of the same shape."""
        counts = tokens_per_expert.tolist()
        parts = zip(torch.split(hidden, counts), torch.split(probs, counts), strict=True)
        return torch.cat([self._expert(index, *part) for index, part in enumerate(parts)]), None

    def _expert(self, index: int, hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        first, second = self.linear_fc1.parts(index), self.linear_fc2.parts(index)
        inner = F.linear(hidden, first["weight"], first.get("bias"))
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, dim=-1)
            if (limit := self.config.activation_func_clamp_value) is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = self.config.activation_func(gate) * (up + self.config.glu_linear_offset)
        else:
            inner = self.config.activation_func(inner)
        scale = probs.unsqueeze(-1)
        output = F.linear((inner * scale).to(hidden.dtype), second["weight"])
        return output + (second["bias"] * scale).to(hidden.dtype) if "bias" in second else output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The entries of TEGroupedMLP: `experts.linear_fc1.weight` is `[num_experts, ...]`, gate and up separate.

        As there, entries are under the names of the parameters: in 0.16.1 the multi-token prediction block replaces its
        own entries, which lack the sharding, by name.
        """
        stated: dict[str, Any] = {}
        offset = get_pg_rank(self.groups.ep) * self.num_local_experts
        total = get_pg_size(self.groups.ep) * self.num_local_experts
        for name, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            cuts = {"weight": 1} if linear.row_parallel else {"weight": 0, "bias": 0}
            for index in range(self.num_local_experts):
                place = (*sharded_offsets, (len(sharded_offsets), offset + index, total))
                shards = make_sharded_tensors_for_checkpoint(
                    linear.parts(index),
                    f"{prefix}experts.{name}.",
                    cuts,
                    place,
                    tp_group=self.groups.expt_tp,
                    dp_cp_group=metadata["dp_cp_group"],
                )
                for part, shard in zip(linear.parts(index), shards.values(), strict=True):
                    if name == "linear_fc1" and self.config.gated_linear_unit:
                        shard = apply_swiglu_sharded_factory(shard, place)
                    shard.replica_id = (*shard.replica_id[:2], get_pg_rank(self.groups.expt_dp))
                    stated[f"{prefix}{name}.{part}{index}"] = shard
        return stated
