"""What is predicted of an FSDP2 side, checked against numbers written down by hand. No model is built."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box
from refit.predict.fsdp2 import Fsdp2Options, Mesh, check, chunk, predict
from tests.predict.families.strategies import models


def preset(name: str) -> ModelShape:
    shape = parse(["--dry-run", "--model", name]).scenario.model
    assert shape is not None
    return shape


def side(world_size: int, *, tp: int = 1, ep: int = 1, replicate: int = 1, first_rank: int = 0) -> SideSpec:
    layout = Layout(tp=tp, ep=ep, etp=1, pp=1, world_size=world_size, first_rank=first_rank)
    return SideSpec(layout, format="fsdp2", options=Fsdp2Options(replicate))


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 20))
def test_chunks_are_those_of_torch(size: int, parts: int, offset: int) -> None:
    """`torch.chunk` by its rule: parts of ceil(size / parts), fewer where that uses the size up."""
    step = -(-size // parts)
    expected = [Box((offset + begin,), (min(step, size - begin),)) for begin in range(0, size, step)]
    found = [chunk(Box((offset,), (size,)), 0, parts, part) for part in range(parts)]
    assert found == expected + [None] * (parts - len(expected))


@pytest.mark.parametrize(
    ("key", "boxes"),
    [
        # 256 columns; rows of TP rank 1 (2048..4095) halved over the two shards: this is shard 1.
        ("embedding.word_embeddings.weight", (Box((3072, 0), (1024, 256)),)),
        # Query groups of 128 rows: 64 of queries, 32 of the key, 32 of the value. TP rank 1 has groups 2 and 3, of the
        # queries shard 1 has group 3; likewise of keys and values.
        ("decoder.layers.1.self_attention.linear_qkv.weight", (Box((384, 0), (128, 256)),)),
        # Columns of TP rank 1, rows of shard 1.
        ("decoder.layers.1.self_attention.linear_proj.weight", (Box((128, 128), (128, 128)),)),
        ("decoder.layers.1.input_layernorm.weight", (Box((128,), (128,)),)),
        # Gate and up, 768 rows each, are quartered.
        ("decoder.layers.1.mlp.linear_fc1.weight", (Box((576, 0), (192, 256)), Box((1344, 0), (192, 256)))),
    ],
)
def test_boxes_of_the_last_rank_of_a_dense_model(key: str, boxes: tuple[Box, ...]) -> None:
    sharding = predict(preset("tiny_qwen3"), side(4, tp=2, first_rank=10))
    assert sharding.of_rank(13).shards[key].boxes == boxes


def test_a_shard_ends_within_a_query_group() -> None:
    """Of 8 shards number 1 has the rows 32..63 of the queries: the second half of group 0's."""
    held = predict(preset("tiny_qwen3"), side(8)).of_rank(1).shards["decoder.layers.0.self_attention.linear_qkv.weight"]
    # Queries 32..63; keys 16..31 of group 0, at row 64 + 16; values 16..31 at row 96 + 16.
    assert held.boxes == (Box((32, 0), (32, 256)), Box((80, 0), (16, 256)), Box((112, 0), (16, 256)))


def test_experts_have_a_mesh_of_their_own() -> None:
    """8 ranks, 2 replicas: EP 2 splits 8 experts, and 2 shards halve what is left, whatever TP is."""
    sharding = predict(preset("tiny_deepseek_v3"), side(8, tp=4, ep=2, replicate=2))
    experts = sharding.by_key["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"]
    assert [(shard.box.offsets[0], shard.box.extents[0], shard.ranks) for shard in experts.shards] == [
        (0, 2, (0, 4)),
        (4, 2, (1, 5)),
        (2, 2, (2, 6)),
        (6, 2, (3, 7)),
    ]
    bias = sharding.by_key["decoder.layers.1.mlp.router.expert_bias"]
    assert [(shard.box, shard.ranks) for shard in bias.shards] == [(Box((0,), (8,)), tuple(range(8)))]


def test_a_vocabulary_that_tp_does_not_divide_is_refused_where_fsdp_shards_it_further() -> None:
    shape = replace(preset("tiny_qwen3"), vocab_size=150)
    with pytest.raises(UsageError, match=r"150 tokens of the vocabulary.* cannot be divided by TP size 4"):
        predict(shape, side(8, tp=4))
    assert predict(shape, side(4, tp=4)).tensors


WHOLE_OF_NETS = ("conv1d", "dt_bias", "A_log", "gate_weight")


@given(models(), st.data())
@settings(max_examples=60)
def test_every_element_is_held_once_per_replica(shape: ModelShape, data: st.DataObject) -> None:
    experts = shape.experts.num_experts if shape.experts else 1
    tp = data.draw(st.sampled_from([n for n in (1, 2, 3) if _splits(shape, n)]))
    shape = replace(shape, vocab_size=shape.vocab_size * tp)
    ep = data.draw(st.sampled_from([n for n in (1, 2, 3) if experts % n == 0]))
    replicate, shards = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    spec = side(replicate * shards * tp * ep, tp=tp, ep=ep, replicate=replicate)
    sharding = predict(shape, spec)
    assert sharding.tensors.keys() == sharding.by_key.keys()
    for key, tensor_sharding in sharding.by_key.items():
        held = sum(shard.box.volume * len(shard.ranks) for shard in tensor_sharding.shards)
        distinct = sum(shard.box.volume for shard in tensor_sharding.shards)
        assert distinct == Box.whole(sharding.tensors[key].shape).volume
        copies = held / distinct
        assert copies >= replicate
        is_whole = any(part in key for part in ("norm", "router", "down_proj", "linear_proj.bias", *WHOLE_OF_NETS))
        assert copies == replicate or is_whole


def _splits(shape: ModelShape, tp: int) -> bool:
    sizes = [shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size]
    shared = shape.experts.shared_ffn_hidden_size if shape.experts else None
    if shape.delta_net is not None:
        net = shape.delta_net
        sizes += [shape.hidden_size, 2 * net.num_value_heads, 2 * (net.key_width + net.value_width)]
    return all(size % tp == 0 for size in [*sizes, shared or tp])


def test_kimi_k2_on_256_ranks() -> None:
    sharding = predict(preset("kimi_k2"), side(256))
    assert sharding.num_parameters == 1_026_408_232_448
    # The experts, 384 over 256 ranks in chunks of 2, fill 192 ranks; the others hold none.
    assert round(max(sharding.bytes_per_rank.values()) / 1e9, 2) == 10.66
    assert round(min(sharding.bytes_per_rank.values()) / 1e9, 2) == 0.09
    assert len({id(each) for each in sharding.by_key.values()}) < 30


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("tiny_qwen3", side(6, tp=2, replicate=2), "6 ranks cannot .* = 2 x 2 = 4 .--destination-world-size, --rl-inf"),
        ("tiny_deepseek_v3", side(4, ep=2, replicate=4), "4 ranks cannot be divided into HSDP replicas x EP = 4 x 2"),
        ("tiny_qwen3", side(3, tp=3), "8 attention heads cannot be divided by TP size 3"),
        ("tiny_qwen3", side(8, tp=8), "4 query groups cannot be divided by TP size 8"),
        ("tiny_qwen3_moe", side(3, ep=3), "8 experts cannot be divided by EP size 3"),
        ("tiny_qwen3", side(2, ep=2), "EP size 2 needs experts"),
        ("tiny", side(2), "the model is none of those with names of Hugging Face"),
    ],
)
def test_what_cannot_be_sharded_so(model: str, spec: SideSpec, message: str) -> None:
    with pytest.raises(UsageError, match=f"^destination: {message}"):
        check(preset(model), spec, "destination")


def test_layers_that_the_family_cannot_have() -> None:
    shape = preset("tiny_deepseek_v3")
    assert shape.experts is not None
    mixed = replace(shape, experts=replace(shape.experts, layers=(True, False, True, True)))
    with pytest.raises(UsageError, match="dense layers first, here layer 0 has experts and layer 1 has none"):
        check(mixed, side(1), "source")
    wide = replace(shape, experts=replace(shape.experts, shared_ffn_hidden_size=130))
    with pytest.raises(UsageError, match="130 is no multiple of 128"):
        check(wide, side(1), "source")


def test_mesh_sizes() -> None:
    assert Mesh.of(side(24, tp=2, ep=4, replicate=3)) == Mesh(replicate=3, shard=4, tp=2, expert_shard=2, ep=4)


def test_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, refit.predict.fsdp2; print({'torch', 'megatron', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    assert result.stdout == "set()\n"
