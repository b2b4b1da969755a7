"""The tables of the model families: a bijection with the logical tensors, the names of transformers and of mbridge."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.cli.parsing import parse
from refit.config.shape import Dtype, ModelShape
from refit.errors import UsageError
from refit.plan.box import Box
from refit.predict.families.deepseek_v2 import DEEPSEEK_V2
from refit.predict.families.deepseek_v3 import DEEPSEEK_V3
from refit.predict.families.glm4_moe import GLM4_MOE
from refit.predict.families.glm4_moe_lite import GLM4_MOE_LITE
from refit.predict.families.gpt_oss import GPT_OSS
from refit.predict.families.llama import LLAMA
from refit.predict.families.minimax_m2 import MINIMAX_M2
from refit.predict.families.mixtral import MIXTRAL
from refit.predict.families.names import NamedModel, named_model
from refit.predict.families.qwen2 import QWEN2
from refit.predict.families.qwen3 import QWEN3
from refit.predict.families.qwen3_moe import QWEN3_MOE
from refit.predict.families.qwen3_next import QWEN3_NEXT
from refit.predict.families.tables import Family
from tests.predict.families.strategies import models

BRIDGES = {
    LLAMA: "mbridge.models.llama:LLaMABridge",
    QWEN2: "mbridge.models.qwen2:Qwen2Bridge",
    MIXTRAL: "mbridge.models.mixtral:MixtralBridge",
    GLM4_MOE: "mbridge.models.glm4moe:GLM4MoEBridge",
    QWEN3: "mbridge.models.qwen3:Qwen3Bridge",
    QWEN3_MOE: "mbridge.models.qwen3moe:Qwen3MoEBridge",
    GPT_OSS: "mbridge.models.mixtral:MixtralBridge",  # but for OWN
    MINIMAX_M2: "mbridge.models.mixtral:MixtralBridge",  # but for OWN
    QWEN3_NEXT: "mbridge.models.qwen2moe:Qwen2MoEBridge",  # but for OWN
    GLM4_MOE_LITE: "mbridge.models.deepseek_v3:DeepseekV3Bridge",  # with the same names
    DEEPSEEK_V2: "mbridge.models.deepseek_v3:DeepseekV3Bridge",  # with the same names
    DEEPSEEK_V3: "mbridge.models.deepseek_v3:DeepseekV3Bridge",
}

OWN = {
    GPT_OSS: {
        "self_attention.core_attention.softmax_offset": "self_attn.sinks",
        "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
        "mlp.router.weight": "mlp.router.weight",
        "mlp.router.bias": "mlp.router.bias",
        "mlp.experts.experts.linear_fc1.weight": "mlp.experts.gate_up_proj",
        "mlp.experts.experts.linear_fc1.bias": "mlp.experts.gate_up_proj_bias",
        "mlp.experts.experts.linear_fc2.weight": "mlp.experts.down_proj",
        "mlp.experts.experts.linear_fc2.bias": "mlp.experts.down_proj_bias",
    },
    QWEN3_NEXT: {
        "self_attention.query.in_proj.weight": "linear_attn.in_proj_qkvz.weight",
        "self_attention.beta.in_proj.weight": "linear_attn.in_proj_ba.weight",
        "self_attention.query.conv1d.weight": "linear_attn.conv1d.weight",
        "self_attention.dt_bias": "linear_attn.dt_bias",
        "self_attention.A_log": "linear_attn.A_log",
        "self_attention.out_norm.weight": "linear_attn.norm.weight",
        "self_attention.out_proj.weight": "linear_attn.out_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    },
    MINIMAX_M2: {
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.router.expert_bias": "block_sparse_moe.e_score_correction_bias",
    },
}
"""Tensors of a layer that mbridge has no family for."""


def preset(name: str) -> ModelShape:
    shape = parse(["--dry-run", "--model", name]).scenario.model
    assert shape is not None
    return shape


@given(models(), st.booleans())
@settings(max_examples=60)
def test_the_names_are_a_bijection_onto_the_logical_tensors(shape: ModelShape, single_experts: bool) -> None:
    """Each element of each Hugging Face tensor is one logical element, and none is left over."""
    model = named_model(shape, Dtype.BF16, single_experts=single_experts)
    counts = {key: np.zeros(spec.shape, int) for key, spec in model.logical.items()}
    for block in model.blocks:
        for tensor in block.tensors:
            held = np.zeros(tensor.shape, int)
            for piece in tensor.pieces:
                key = block.key_prefix + piece.key
                assert piece.box.volume == piece.held.volume
                held[piece.held.slices_within(Box.whole(tensor.shape))] += 1
                counts[key][piece.box.slices_within(Box.whole(counts[key].shape))] += 1
            assert (held == 1).all(), tensor.name
    assert all((count == 1).all() for count in counts.values())


@given(models(), st.booleans(), st.data())
@settings(max_examples=60)
def test_any_box_is_mapped_element_by_element(shape: ModelShape, single_experts: bool, data: st.DataObject) -> None:
    model = named_model(shape, Dtype.BF16, single_experts=single_experts)
    block = data.draw(st.sampled_from(model.blocks))
    tensor = data.draw(st.sampled_from(block.tensors))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in tensor.shape]
    held = Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
    expected = _logical_numbers(model, block.key_prefix, tensor)[held.slices_within(Box.whole(tensor.shape))]
    found = np.full(held.extents, -1)
    for part, logical in tensor.pieces_of(held):
        whole = Box.whole(model.logical[block.key_prefix + logical.key].shape)
        numbers = np.arange(whole.volume).reshape(whole.extents)[logical.box.slices_within(whole)]
        found[part.slices_within(held)] = _as_held(numbers, logical.axes, part)
    assert (found == expected).all()


def _logical_numbers(model: NamedModel, key_prefix: str, tensor: Any) -> np.ndarray:
    """The number of the logical element behind each element of `tensor`, joined row by row from its pieces."""
    dim = 1 if tensor.row.routed and len(tensor.shape) == 3 else 0
    parts = []
    for piece in tensor.pieces:
        whole = Box.whole(model.logical[key_prefix + piece.key].shape)
        numbers = np.arange(whole.volume).reshape(whole.extents)
        parts.append(_as_held(numbers[piece.box.slices_within(whole)], piece.axes, piece.held))
    if tensor.stored is not None:  # gate and up in turn
        return np.concatenate(
            parts, axis=next(dim for dim, size in enumerate(parts[0].shape) if size != tensor.shape[dim])
        )
    return np.concatenate(parts, axis=dim)


def _as_held(numbers: np.ndarray, axes: tuple[int, ...] | None, held: Box) -> np.ndarray:
    """The numbers of a logical box, as the tensor has them in its box `held`."""
    if axes is not None:
        numbers = numbers.transpose([axes.index(dim) for dim in sorted(axes)])
    return numbers.reshape(held.extents)


def test_rows_of_a_grouped_query_attention() -> None:
    """Qwen3-30B-A3B: 4 groups of 8 queries, a key and a value, 128 rows each."""
    tensors = {tensor.name: tensor for tensor in named_model(preset("qwen3_30b_a3b"), Dtype.BF16).blocks[1].tensors}
    key = tensors["self_attn.k_proj.weight"]
    assert key.shape == (512, 2048)
    assert [piece.box.offsets[0] for piece in key.pieces] == [1024, 2304, 3584, 4864]
    parts = [(part.offsets[0], logical.box) for part, logical in key.pieces_of(Box((100, 0), (50, 2048)))]
    assert parts == [(100, Box((1124, 0), (28, 2048))), (128, Box((2304, 0), (22, 2048)))]


def test_layers_of_a_kind_share_their_tensors() -> None:
    model = named_model(preset("kimi_k2"), Dtype.BF16)
    assert len(model.blocks) == 62
    assert len({id(block.tensors) for block in model.blocks}) == 3
    assert len(model.logical) == sum(len({p.key for t in b.tensors for p in t.pieces}) for b in model.blocks)


@pytest.mark.parametrize(
    "name",
    [
        "kimi_k2",
        "deepseek_v3",
        "deepseek_v2_lite",
        "qwen3_30b_a3b",
        "qwen3_235b_a22b",
        "mixtral_8x7b",
        "glm4_5",
        "glm4_5_air",
        "glm4_7_flash",
        "gpt_oss_20b",
        "gpt_oss_120b",
        "minimax_m2",
    ],
)
def test_published_models_are_of_a_family(name: str) -> None:
    model = named_model(replace(preset(name), mtp_num_layers=0), Dtype.BF16)
    elements = sum(Box.whole(t.shape).volume for block in model.blocks for t in block.tensors)
    assert elements == sum(Box.whole(spec.shape).volume for spec in model.logical.values())


def test_a_model_of_no_family_is_refused_with_all_that_differs() -> None:
    differs = r"glm4_moe give --moe-router-enable-expert-bias$"
    with pytest.raises(UsageError, match=rf"Hugging Face, llama, qwen2, qwen3, .*: for {differs}"):
        named_model(preset("tiny"), Dtype.BF16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"position_embedding_type": "learned_absolute"}, "give --position-embedding-type rope"),
        ({"normalization": "LayerNorm"}, "give --normalization RMSNorm"),
        ({"add_qkv_bias": True}, "leave --add-qkv-bias out"),
        ({"swiglu": False}, "give --swiglu"),
        ({"mtp_num_layers": 1}, "give --mtp-num-layers 0"),
    ],
)
def test_what_a_family_has_no_name_for_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        named_model(replace(preset("qwen3_30b_a3b"), **changed), Dtype.BF16)


@pytest.mark.parametrize("family", BRIDGES)
@given(data=st.data())
@settings(max_examples=5)
def test_mbridge_has_the_same_names(family: Family, data: st.DataObject) -> None:
    """mbridge 0.15.1 names the Hugging Face tensors of each Megatron parameter, in the order in which it joins them."""
    shape = data.draw(models(family))
    if family in (QWEN3_MOE, QWEN3_NEXT) and shape.experts is not None:  # mbridge has no dense layers there
        shape = replace(shape, experts=replace(shape.experts, layers=(True,) * shape.num_layers))
    model = named_model(shape, Dtype.BF16, single_experts=True)
    bridge = _bridge(family)
    for block in model.blocks:
        ours: dict[tuple[str, int | None], list[str]] = {}
        for tensor in block.tensors:
            expert = tensor.pieces[0].box.offsets[0] if tensor.row.routed else None
            ours.setdefault((block.key_prefix + tensor.row.key, expert), []).append(block.prefix + tensor.name)
        for (key, expert), names in ours.items():
            assert bridged_names(bridge, family, key, expert) == names


def bridged_names(bridge: Any, family: Family, key: str, expert: int | None) -> list[str]:
    """The Hugging Face tensors of a logical tensor, or of one expert of it."""
    layer, own = ".".join(key.split(".")[2:3]), OWN.get(family, {}).get(".".join(key.split(".")[3:]))
    if own is not None:
        return [f"model.layers.{layer}.{own}"]
    found: list[str] = bridge._weight_name_mapping_mcore_to_hf(_parameter(family, key, expert))
    return found


def _bridge(family: Family) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, _, name = BRIDGES[family].partition(":")
        bridge = getattr(importlib.import_module(module), name)
    return object.__new__(bridge)  # its name maps need no configuration


def _parameter(family: Family, key: str, expert: int | None) -> str:
    """The parameter's name in a model with Transformer Engine layers, from which mbridge translates."""
    norms = {"self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight"}
    if family in (GLM4_MOE_LITE, DEEPSEEK_V2, DEEPSEEK_V3):
        norms["self_attention.q_layernorm.weight"] = "self_attention.linear_q_up_proj.layer_norm_weight"
    else:
        norms[".input_layernorm.weight"] = ".self_attention.linear_qkv.layer_norm_weight"
    for ours, theirs in norms.items():
        key = key.replace(ours, theirs)
    if family in (LLAMA, QWEN2, QWEN3):
        key = key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    return key if expert is None else f"{key.replace('experts.experts', 'experts')}{expert}"
