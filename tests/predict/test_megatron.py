"""What is predicted of a Megatron side, checked against numbers written down by hand. No model is built."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from refit.config.layout import Layout
from refit.config.shape import Dtype, Experts, LatentAttention, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.sharding import RankSharding
from refit.predict.megatron import predict
from refit.predict.megatron_layout import check
from refit.predict.sides import check_side, predict_side

SMALL = ModelShape(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    ffn_hidden_size=12,
    vocab_size=30,
    make_vocab_size_divisible_by=4,
    max_position_embeddings=16,
    position_embedding_type="learned_absolute",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=True,
    tied_embeddings=False,
    qk_layernorm=False,
    mla=None,
    experts=Experts(4, 2, 6, None, (False, True), True, True),
)
KIMI_K2 = ModelShape(
    num_layers=61,
    hidden_size=7168,
    num_attention_heads=64,
    num_query_groups=64,
    kv_channels=128,
    ffn_hidden_size=18432,
    vocab_size=163840,
    make_vocab_size_divisible_by=128,
    max_position_embeddings=4096,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=False,
    tied_embeddings=False,
    qk_layernorm=True,
    mla=LatentAttention(1536, 512, 128, 64, 128),
    experts=Experts(384, 8, 2048, 2048, (False,) + (True,) * 60, True, True),
)


def side(**sizes: int) -> SideSpec:
    return SideSpec(Layout(**sizes))


@pytest.mark.parametrize(
    ("key", "boxes"),
    [
        # Vocabulary 30 padded to a multiple of 4 * TP 2: 32 rows, halved.
        ("embedding.word_embeddings.weight", (Box((16, 0), (16, 8)),)),
        ("embedding.position_embeddings.weight", (Box((0, 0), (16, 8)),)),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (Box((8, 0), (8, 8)),)),
        ("decoder.layers.0.self_attention.linear_qkv.bias", (Box((8,), (8,)),)),
        ("decoder.layers.0.self_attention.linear_proj.weight", (Box((0, 4), (8, 4)),)),
        # [gate; up], 12 rows each: the second half of either.
        ("decoder.layers.0.mlp.linear_fc1.weight", (Box((6, 0), (6, 8)), Box((18, 0), (6, 8)))),
        ("decoder.layers.0.mlp.linear_fc2.weight", (Box((0, 6), (8, 6)),)),
        # Experts 2 and 3 of 4; gate and up, 6 rows each, halved over ETP 2.
        (
            "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
            (Box((2, 3, 0), (2, 3, 8)), Box((2, 9, 0), (2, 3, 8))),
        ),
        ("decoder.layers.1.mlp.experts.experts.linear_fc2.weight", (Box((2, 0, 3), (2, 8, 3)),)),
        ("decoder.layers.1.mlp.router.expert_bias", (Box((0,), (4,)),)),
        ("decoder.final_layernorm.weight", (Box((0,), (8,)),)),
    ],
)
def test_boxes_of_the_last_rank(key: str, boxes: tuple[Box, ...]) -> None:
    spec = side(tp=2, ep=2, etp=2, pp=1, world_size=4, first_rank=3)
    assert predict(SMALL, spec).of_rank(6).shards[key].boxes == boxes


def test_gate_and_up_are_one_box_where_nothing_splits_them() -> None:
    """As live rank shardings are coalesced."""
    sharding = predict(SMALL, side(tp=1, ep=2, etp=1, pp=1, world_size=2))
    shards = sharding.of_rank(1).shards
    assert shards["decoder.layers.0.mlp.linear_fc1.weight"].boxes == (Box((0, 0), (24, 8)),)
    assert shards["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].boxes == (Box((2, 0, 0), (2, 12, 8)),)


def test_replicas_stand_in_window_order() -> None:
    """ETP 1 under TP 2: the experts of EP rank 0 lie on every second rank, dense rows on the tensor ranks."""
    sharding = predict(SMALL, side(tp=2, ep=2, etp=1, pp=1, world_size=4, first_rank=10))
    experts = sharding.by_key["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"]
    assert [(shard.box.offsets[0], shard.ranks) for shard in experts.shards] == [(0, (10, 12)), (2, (11, 13))]
    dense = sharding.by_key["decoder.layers.1.self_attention.linear_proj.weight"]
    assert [(shard.box.offsets[1], shard.ranks) for shard in dense.shards] == [(0, (10, 12)), (4, (11, 13))]
    assert sharding.ranks == (10, 11, 12, 13)


def test_stages_hold_their_layers_and_ends() -> None:
    sharding = predict(SMALL, side(tp=1, ep=1, etp=1, pp=2, world_size=2))
    first, last = (set(sharding.of_rank(rank).shards) for rank in (0, 1))
    assert not first & last
    assert {key.split(".")[0] for key in first} == {"embedding", "decoder"}
    assert "output_layer.weight" in last
    assert "decoder.final_layernorm.weight" in last
    assert all(".layers.0." in key for key in first if ".layers." in key)


def test_tied_embeddings_are_copied_to_the_last_stage() -> None:
    sharding = predict(replace(SMALL, tied_embeddings=True), side(tp=1, ep=1, etp=1, pp=2, world_size=2))
    assert sharding.by_key["embedding.word_embeddings.weight"].shards[0].ranks == (0, 1)
    assert sharding.by_key["embedding.position_embeddings.weight"].shards[0].ranks == (0,)
    assert "output_layer.weight" not in sharding.tensors


MTP = replace(SMALL, mtp_num_layers=2, position_embedding_type="rope")
"""With two multi-token prediction layers."""


def test_virtual_stages_interleave_their_layers() -> None:
    """Four layers on two stages of two chunks: 0 and 2, 1 and 3."""
    four = replace(SMALL, num_layers=4, experts=None)
    sharding = predict(four, side(tp=1, ep=1, etp=1, pp=2, world_size=2, vpp=2))
    norms = [sharding.by_key[f"decoder.layers.{layer}.input_layernorm.weight"].shards[0].ranks for layer in range(4)]
    assert norms == [(0,), (1,), (0,), (1,)]
    whole = predict(four, side(tp=1, ep=1, etp=1, pp=2, world_size=2))
    assert sharding.bytes_per_rank == whole.bytes_per_rank
    assert sharding.num_parameters == whole.num_parameters


def test_token_prediction_lies_on_the_last_stage_with_a_copy_of_the_embedding() -> None:
    sharding = predict(MTP, side(tp=1, ep=1, etp=1, pp=2, world_size=2))
    assert sharding.by_key["embedding.word_embeddings.weight"].shards[0].ranks == (0, 1)
    assert sharding.by_key["output_layer.weight"].shards[0].ranks == (1,)
    assert {
        shard.ranks for key in sharding.by_key if key.startswith("mtp.") for shard in sharding.by_key[key].shards
    } == {(1,)}
    layers = {
        name: {key.partition(f"{name}.")[2] for key in sharding.tensors if f"{name}." in key}
        for name in ("decoder.layers.1", "mtp.layers.0.transformer_layer", "mtp.layers.1.transformer_layer")
    }
    assert len({frozenset(keys) for keys in layers.values()}) == 1, "of the last decoder layer's kind, routed"
    assert sharding.tensors["mtp.layers.1.eh_proj.weight"].shape == (8, 16)
    embedding = 2 * math.prod(sharding.tensors["embedding.word_embeddings.weight"].shape)
    alone = predict(MTP, side(tp=1, ep=1, etp=1, pp=1, world_size=1))
    assert sum(sharding.bytes_per_rank.values()) == alone.bytes_per_rank[0] + embedding


def test_latent_experts_are_narrow_between_replicated_projections() -> None:
    assert SMALL.experts is not None
    shape = replace(SMALL, experts=replace(SMALL.experts, latent_size=4))
    held = predict(shape, side(tp=2, ep=1, etp=2, pp=1, world_size=2)).of_rank(1).shards
    prefix = "decoder.layers.1.mlp"
    assert held[f"{prefix}.experts.experts.linear_fc2.weight"].tensor.shape == (4, 4, 6)
    assert held[f"{prefix}.fc1_latent_proj.weight"].boxes == (Box((0, 0), (4, 8)),)
    assert held[f"{prefix}.fc2_latent_proj.weight"].boxes == (Box((0, 0), (8, 4)),)


def test_transformer_engine_replicates_latent_down_projections() -> None:
    spec = side(tp=8, ep=8, etp=8, pp=1, world_size=64)
    key = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    assert predict(KIMI_K2, spec).of_rank(1).shards[key].boxes == (Box((72, 0), (72, 7168)),)
    whole = predict(KIMI_K2, replace(spec, transformer_impl="transformer_engine")).of_rank(1).shards[key]
    assert whole.boxes == (Box((0, 0), (576, 7168)),)


def test_flags_of_tensors() -> None:
    tensors = predict(SMALL, side(tp=1, ep=1, etp=1, pp=1, world_size=1)).tensors
    assert tensors["embedding.word_embeddings.weight"].padded
    assert tensors["output_layer.weight"].padded
    assert tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].stacked
    assert tensors["decoder.layers.1.mlp.router.expert_bias"].dtype == "float32"
    assert {tensor.dtype for key, tensor in tensors.items() if "expert_bias" not in key} == {"bfloat16"}


def test_parameters_have_the_dtype_of_the_side() -> None:
    spec = replace(side(tp=1, ep=1, etp=1, pp=1, world_size=1), dtype=Dtype.FP32)
    assert {tensor.dtype for tensor in predict(SMALL, spec).tensors.values()} == {"float32"}
    halves, singles = (
        predict(replace(SMALL, experts=None), replace(spec, dtype=dtype)) for dtype in (Dtype.FP16, Dtype.FP32)
    )
    assert singles.bytes_per_rank[0] == 2 * halves.bytes_per_rank[0]


@pytest.mark.parametrize(
    ("changed", "sizes", "message"),
    [
        ({"num_attention_heads": 3}, {"tp": 2}, "3 attention heads cannot be divided by TP size 2"),
        ({"ffn_hidden_size": 13}, {"tp": 2}, "13 FFN hidden size cannot be divided by TP size 2"),
        ({"num_query_groups": 3}, {"tp": 2}, "3 query groups cannot be divided by TP size 2"),
        ({"num_attention_heads": 8, "num_query_groups": 3}, {"tp": 4}, "4 TP size cannot be divided by query groups 3"),
        ({}, {"ep": 3}, "4 experts cannot be divided by EP size 3"),
        ({}, {"etp": 4}, "6 expert FFN hidden size cannot be divided by ETP size 4"),
        (
            {"experts": Experts(4, 2, 6, 5, (True,) * 2, True, True)},
            {"tp": 2},
            "5 shared expert FFN hidden size cannot",
        ),
        ({"experts": None}, {"ep": 2}, "EP size 2 needs experts"),
        ({"mtp_num_layers": 3}, {}, "3 multi-token prediction layers need --position-embedding-type rope or none"),
        (
            {"mtp_num_layers": 1, "position_embedding_type": "rope", "tied_embeddings": True},
            {"pp": 2},
            "Megatron cannot tie the output layer to the embedding with 1 multi-token prediction layers on PP size 2",
        ),
        (
            {"mtp_num_layers": 1, "position_embedding_type": "rope", "hidden_size": 9},
            {"tp": 2},
            "9 hidden size, of multi-token prediction, cannot be divided by TP size 2",
        ),
    ],
)
def test_a_model_that_cannot_be_sharded_so(changed: dict[str, Any], sizes: dict[str, int], message: str) -> None:
    shape, spec = replace(SMALL, **changed), side(**{"tp": 1, "ep": 1, "etp": 1, "pp": 1, "world_size": 12, **sizes})
    for checker in (check, check_side):
        with pytest.raises(UsageError, match=f"^destination: {message}"):
            checker(shape, spec, "destination")
    with pytest.raises(UsageError, match=message):
        predict_side(shape, spec)


def test_stages_that_do_not_divide_the_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="2 layers do not divide by pipeline size 3"):
        check(SMALL, side(tp=1, ep=1, etp=1, pp=3, world_size=3), "source")


def test_an_unknown_format_is_refused() -> None:
    spec = replace(side(tp=1, ep=1, etp=1, pp=1, world_size=1), format="gguf")
    with pytest.raises(UsageError, match=r"unknown side format 'gguf': choose one of .*megatron"):
        predict_side(SMALL, spec)


def test_every_element_of_every_tensor_is_held() -> None:
    sharding = predict(SMALL, side(tp=2, ep=4, etp=1, pp=2, world_size=8))
    for key, tensor_sharding in sharding.by_key.items():
        assert (
            sum(shard.box.volume for shard in tensor_sharding.shards) == Box.whole(sharding.tensors[key].shape).volume
        )


def test_kimi_k2_on_128_ranks() -> None:
    """Parameters as counted on the meta device (1.0264 T) and 60 layers' expert biases; bytes as there."""
    sharding = predict(KIMI_K2, side(tp=16, ep=8, etp=16, pp=1, world_size=128))
    assert sharding.num_parameters == 1_026_408_209_408 + 60 * 384
    assert round(max(sharding.bytes_per_rank.values()) / 1e9, 1) == 17.6
    # Layers of a kind share one TensorSharding, which keeps predicting and planning fast.
    assert len({id(tensor_sharding) for tensor_sharding in sharding.by_key.values()}) < 30


def test_an_uneven_split_names_the_tensor() -> None:
    odd = replace(KIMI_K2, mla=LatentAttention(1540, 512, 128, 64, 128))
    with pytest.raises(UsageError, match=r"linear_q_down_proj.weight \[1540, 7168\] cannot be split into 8 equal"):
        predict(odd, side(tp=8, ep=1, etp=1, pp=1, world_size=8))


def test_a_rank_sharding_equals_one_made_of_parts() -> None:
    """A sharding holds what `RankSharding.of` makes of the same boxes, uncoalesced."""
    sharding = predict(SMALL, side(tp=2, ep=2, etp=1, pp=1, world_size=4))
    one_rank = sharding.of_rank(2)
    rows = [
        (shard.tensor, box.narrow(0, begin, begin + 1))
        for shard in one_rank.shards.values()
        for box in shard.boxes
        for begin in range(box.offsets[0], box.ends[0])
    ]
    assert RankSharding.of(rows).differences(one_rank) == []


def test_needs_neither_torch_nor_megatron() -> None:
    code = "import sys, refit.predict.megatron; print({'torch', 'megatron'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    assert result.stdout == "set()\n"
