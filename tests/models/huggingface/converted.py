"""What mbridge makes of Hugging Face's tensors: the parameters of a Megatron model, without this suite's tables."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from refit.config.shape import Dtype, ModelShape
from refit.models.huggingface.model import meta_model
from refit.predict.families.names import named_model
from refit.predict.families.tables import Family, Part
from tests.models.huggingface.sides import alone
from tests.predict.families.test_names import BRIDGES, _bridge, bridged_names


def converted_by_mbridge(family: Family, shape: ModelShape, seeded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a Megatron model with local layers, as mbridge makes them of Hugging Face's."""
    assert family in BRIDGES
    bridge = _bridge(family)
    bridge.hf_config = meta_model(shape, named_model(shape, Dtype.FP32), alone(Dtype.FP32)).config
    bridge.dtype, bridge.make_vocab_size_divisible_by = torch.float32, None
    single = {name: expert for key, tensor in seeded.items() for name, expert in _single_experts(seeded, key, tensor)}
    if family.published:
        single = {_as_published(name): tensor for name, tensor in single.items()}
    converted = {}
    for block in named_model(shape, Dtype.FP32, single_experts=True).blocks:
        for tensor in block.tensors:
            expert = tensor.pieces[0].box.offsets[0] if tensor.row.routed else None
            key = block.key_prefix + tensor.row.key
            names = bridged_names(bridge, family, key, expert)
            if tensor.row.interleaved or tensor.row.transposed or key.endswith("linear_fc2.bias"):
                converted |= _experts_of_gpt_oss(key, single[names[0]])
                continue
            if tensor.row.others:
                converted |= _of_delta_net(block.key_prefix, tensor.row.name, single[names[0]], shape)
                continue
            if tensor.row.part is Part.QUERY_AND_GATE:
                converted[key] = _with_gates(*(single[name] for name in names), shape)
                continue
            if key in converted and shape.attention_output_gate and key.endswith("linear_qkv.weight"):
                continue
            if expert is not None:
                key = key.replace("experts.experts", f"experts.local_experts.{expert}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                converted[key] = bridge._weight_to_mcore_format(key, [single[name] for name in names])
    return converted


def _experts_of_gpt_oss(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """As its model computes: gate in even columns, up in odd ones, inputs times weight."""
    if ".linear_fc1." in key:
        tensor = torch.cat([tensor[..., 0::2], tensor[..., 1::2]], dim=-1)
    if key.endswith("weight"):
        tensor = tensor.transpose(1, 2)
    return {key.replace("experts.experts", f"experts.local_experts.{each}"): part for each, part in enumerate(tensor)}


def _of_delta_net(prefix: str, name: str, tensor: torch.Tensor, shape: ModelShape) -> dict[str, torch.Tensor]:
    """The sections of Megatron's tensors, as `fix_query_key_value_ordering` of transformers' model takes them apart."""
    net = shape.delta_net
    assert net is not None
    keys, values = net.key_width, net.value_width
    if name.endswith("conv1d.weight"):
        parts = dict(zip(("query", "key", "value"), tensor.split([keys, keys, values]), strict=True))
        return {f"{prefix}self_attention.{section}.conv1d.weight": part for section, part in parts.items()}
    sections = ("query", "key", "value", "z") if name.endswith("qkvz.weight") else ("beta", "alpha")
    sizes = [keys, keys, values, values] if len(sections) == 4 else [net.num_value_heads] * 2
    heads = tensor.view(net.num_key_heads, -1, tensor.size(-1)).split([size // net.num_key_heads for size in sizes], 1)
    parts = dict(zip(sections, heads, strict=True))
    return {f"{prefix}self_attention.{section}.in_proj.weight": part.flatten(0, 1) for section, part in parts.items()}


def _with_gates(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """As Megatron's attention splits them: of every query group all queries, all gates, the key and the value."""
    groups, size = shape.num_query_groups, shape.kv_channels
    each = query.view(groups, -1, 2, size, query.size(-1))
    parts = [
        each[:, :, 0].flatten(1, 2),
        each[:, :, 1].flatten(1, 2),
        *(t.view(groups, size, -1) for t in (key, value)),
    ]
    return torch.cat(parts, dim=1).flatten(0, 1)


def with_joined_sections(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Delta nets' tensors as Megatron's model has them, their sections one behind another."""
    found: dict[str, list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found.setdefault(re.sub(r"\.\w+\.(in_proj|conv1d)\.weight$", r".\1.weight", key), []).append(tensor)
    return {key: torch.cat(parts) for key, parts in found.items()}


def _as_published(name: str) -> str:
    for ours, published in (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(f".{ours}.", f".{published}.")
    return name


def _single_experts(seeded: Mapping[str, Any], key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    prefix, found, name = key.partition("mlp.experts.")
    if not found or f"{key}_bias" in seeded or key.endswith("_bias"):
        return [(key, tensor)]
    if name == "down_proj":
        return [(f"{prefix}mlp.experts.{expert}.down_proj.weight", part) for expert, part in enumerate(tensor)]
    return [
        (f"{prefix}mlp.experts.{expert}.{half}.weight", rows)
        for expert, part in enumerate(tensor)
        for half, rows in zip(("gate_proj", "up_proj"), part.chunk(2), strict=True)
    ]
