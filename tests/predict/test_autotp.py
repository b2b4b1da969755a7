"""What is predicted of an AutoTP side, checked against numbers written down by hand. No model is built."""

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
from refit.predict.autotp import AutotpOptions, part_sizes, predict
from refit.predict.sides import check_side
from tests.predict.families.strategies import models
from tests.predict.test_fsdp2 import preset


def side(world_size: int, *, tp: int = 1, first_rank: int = 0, zero_stage: int | None = 1) -> SideSpec:
    layout = Layout(tp=tp, ep=1, etp=1, pp=1, world_size=world_size, first_rank=first_rank)
    return SideSpec(layout, format="autotp", options=AutotpOptions(zero_stage))


@pytest.mark.parametrize(
    ("size", "tp", "num_heads", "sizes"),
    [
        (99, 2, None, [50, 49]),  # an FFN, by rows
        (96, 2, 3, [64, 32]),  # queries of 3 heads, by heads
        (64, 6, 4, [16, 16, 16, 16, 0, 0]),  # more ranks than heads
        (3, 4, None, [1, 1, 1, 0]),
    ],
)
def test_parts_are_uneven(size: int, tp: int, num_heads: int | None, sizes: list[int]) -> None:
    assert list(part_sizes(size, tp, num_heads)) == sizes


@pytest.mark.parametrize(
    ("key", "box"),
    [
        ("embedding.word_embeddings.weight", Box((0, 0), (4096, 256))),
        # 4 query groups of 128 rows over 3 ranks: two, one and one. Rank 5 is TP rank 2 of the second replica.
        ("decoder.layers.1.self_attention.linear_qkv.weight", Box((384, 0), (128, 256))),
        ("decoder.layers.1.self_attention.linear_proj.weight", Box((0, 192), (256, 64))),
        ("decoder.layers.1.mlp.linear_fc2.weight", Box((0, 512), (256, 256))),
        ("decoder.layers.1.input_layernorm.weight", Box((0,), (256,))),
    ],
)
def test_boxes_of_the_last_rank_of_a_dense_model(key: str, box: Box) -> None:
    shape = preset("tiny_qwen3")
    sharding = predict(shape, side(6, tp=3, first_rank=10))
    if shape.tied_embeddings and key.startswith("embedding"):  # 4096 rows over 3 ranks: 1366, 1365, 1365
        box = Box((2731, 0), (1365, 256))
    assert sharding.of_rank(15).shards[key].boxes == (box,)


def test_experts_and_routers_are_whole_shared_experts_are_not() -> None:
    held = predict(preset("tiny_deepseek_v3"), side(2, tp=2)).of_rank(1).shards
    layer = "decoder.layers.1.mlp."
    for name in ("experts.experts.linear_fc1.weight", "router.weight", "router.expert_bias"):
        assert held[layer + name].boxes[0].offsets[0] == 0
        assert held[layer + name].boxes == (Box.whole(held[layer + name].tensor.shape),)
    assert held[layer + "shared_experts.linear_fc2.weight"].boxes[0].offsets[1] > 0


def most_tp(shape: ModelShape, tp: int) -> int:
    """The TP size that AutoTP takes instead of `tp`: it cannot split norms over all heads, sinks, or delta nets."""
    whole = shape.qk_norm_over_heads or shape.attention_sinks or shape.delta_net is not None
    return 1 if whole else min(tp, shape.vocab_size)


@given(models(), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60)
def test_every_element_is_held_once_per_replica_or_on_every_rank(shape: ModelShape, tp: int, dp: int) -> None:
    tp = most_tp(shape, tp)
    sharding = predict(shape, side(tp * dp, tp=tp))
    assert sharding.tensors.keys() == sharding.by_key.keys()
    for key, tensor_sharding in sharding.by_key.items():
        volume = Box.whole(sharding.tensors[key].shape).volume
        assert sum(shard.box.volume for shard in tensor_sharding.shards) == volume
        held = sum(shard.box.volume * len(shard.ranks) for shard in tensor_sharding.shards)
        assert held in (volume * dp, volume * dp * tp)


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("tiny", side(2), "the model is none of those with names of Hugging Face"),
        ("tiny_qwen3", replace(side(2), layout=replace(side(2).layout, ep=2)), "autotp sides have tp only, not ep 2"),
    ],
)
def test_what_cannot_be_sharded_so(model: str, spec: SideSpec, message: str) -> None:
    with pytest.raises(UsageError, match=f"^destination: {message}"):
        check_side(preset(model), spec, "destination")


def test_a_vocabulary_smaller_than_tp() -> None:
    small = replace(preset("tiny_qwen3"), vocab_size=3)
    with pytest.raises(UsageError, match="it has 3 rows for TP size 4"):
        check_side(small, side(4, tp=4), "source")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--zero-stage=3"], "--zero-stage: must be at most 2, got 3"),
        (["--expert-model-parallel-size=2"], "--expert-model-parallel-size 2: autotp sides have tp only"),
        (["--rl-inference-zero-stage=1"], "--rl-inference-zero-stage"),
        (["--tensor-model-parallel-size=2", "--source-world-size=3"], "source: .*3"),
    ],
)
def test_flags_that_contradict(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--model=tiny_qwen3", "--source-format=autotp", *flags])


def test_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, refit.predict.autotp; print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    assert result.stdout == "set()\n"
