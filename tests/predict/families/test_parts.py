"""Fused tensors in parts: every row is where the checkpoint has it, in the prediction and in live memory."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from refit.config.layout import Layout
from refit.config.quantisation import Quantisation
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.memory.weights import LocalShard, LocalWeights, shards_in_parts
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.predict import megatron
from refit.predict.families.names import named_model
from refit.predict.families.parts import Parts, model_in_parts, parts_of, sharding_in_parts
from refit.predict.families.qwen3 import QWEN3
from tests.predict.families.strategies import models

BLOCK = Quantisation("fp8-block", "amax")


@st.composite
def with_heads(draw: st.DrawFn) -> ModelShape:
    """Heads of fewer rows than a block, of more, and of whole blocks."""
    shape: ModelShape = draw(models(QWEN3))
    return replace(shape, kv_channels=draw(st.sampled_from([16, 64, 128, 192])), num_layers=2)


def parts_of_shape(shape: ModelShape, quantisation: Quantisation = BLOCK) -> Parts:
    return parts_of(named_model(shape, Dtype.BF16), quantisation)


@given(with_heads())
def test_heads_of_whole_blocks_stay_as_they_are(shape: ModelShape) -> None:
    """And those of a single query group, whose queries lie in one piece."""
    fused = {f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in (0, 1)}
    named, is_cut = named_model(shape, Dtype.BF16), shape.num_query_groups > 1 and shape.kv_channels % 128
    assert parts_of(named, BLOCK).keys() == (fused if is_cut else set())
    assert parts_of(named, Quantisation("mxfp8", "ceil")) == {}, "blocks of one row"
    assert parts_of(named, replace(BLOCK, kept=("layers.0.",))).keys() <= {key for key in fused if ".1." in key}
    assert model_in_parts(named, {}) is named


@given(with_heads())
def test_parts_have_the_rows_of_the_checkpoints_tensors(shape: ModelShape) -> None:
    """Megatron's `[groups, queries + key + value, head, hidden]`."""
    groups, size, hidden = shape.num_query_groups, shape.kv_channels, shape.hidden_size
    queries = shape.num_attention_heads // groups
    fused = torch.arange(groups * (queries + 2) * size * hidden).view(-1, hidden)
    heads = fused.view(groups, queries + 2, size, hidden)
    wanted = [heads[:, :queries], heads[:, queries], heads[:, queries + 1]]
    for key, tensors in parts_of_shape(shape).items():
        whole = LocalShard(TensorSpec(key, tuple(fused.shape), "int64"), Box.whole(fused.shape), fused, fused)
        held = LocalWeights(shards_in_parts([whole], {key: tensors}))
        for part, rows in zip(tensors, wanted, strict=True):
            found = torch.full(part.tensor.shape, -1)
            for view in held.views(part.tensor.key, Box.whole(part.tensor.shape)):
                found[view.box.slices_within(Box.whole(part.tensor.shape))] = view.data
            assert torch.equal(found, rows.reshape(-1, hidden))


@given(with_heads(), st.data())
@settings(max_examples=30)
def test_the_prediction_is_what_live_memory_has(shape: ModelShape, data: st.DataObject) -> None:
    tp = data.draw(st.sampled_from([tp for tp in (1, 2, 3) if shape.num_query_groups % tp == 0]))
    shape = replace(shape, ffn_hidden_size=6, vocab_size=24)
    side = SideSpec(Layout(tp, 1, tp, 1, 2 * tp, first_rank=data.draw(st.integers(0, 3))))
    sharding, parts = megatron.predict(shape, side), parts_of_shape(shape)
    predicted = sharding_in_parts(sharding, parts)
    assert predicted.bytes_per_rank == sharding.bytes_per_rank
    for rank in side.ranks:
        shards = []
        for held in sharding.of_rank(rank).shards.values():
            memory = [torch.empty(box.extents, dtype=torch.bfloat16) for box in held.boxes]
            shards += [LocalShard(held.tensor, box, *[data] * 2) for box, data in zip(held.boxes, memory, strict=True)]
        live = LocalWeights(shards_in_parts(shards, parts))
        assert predicted.of_rank(rank).differences(live.rank_sharding) == []
