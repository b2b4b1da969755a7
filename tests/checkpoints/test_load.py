"""Weights filled from files, and the reader that the oracle goes by, both against the library's whole tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refit.bench import oracle
from refit.bench.file_values import FileValues
from refit.checkpoints.contents import Contents
from refit.checkpoints.load import load
from refit.config.layout import Layout
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.memory.weights import LocalWeights, new_shard
from refit.plan.sharding import Sharding, TensorSpec
from refit.predict.sides import predict_side
from tests.checkpoints.made import DEEPSEEK_V3, QWEN3_MOE, as_block_fp8, checkpoint, contents, shape_of, tensors_of

CPU = torch.device("cpu")
LAYERS = "decoder.layers.0."


def sharding(flags: tuple[str, ...], tp: int, dtype: Dtype = Dtype.BF16, ep: int = 1) -> Sharding:
    """Of a Megatron-Core side on `tp` ranks, which have slices of all experts, or with `ep` of `tp` whole ones."""
    shape = shape_of(flags)
    ep = ep if shape.experts is not None else 1
    return predict_side(shape, SideSpec(Layout(tp=tp, ep=ep, etp=tp // ep, pp=1, world_size=tp), dtype=dtype))


def empty(side: Sharding, rank: int) -> LocalWeights:
    """What a rank of the side holds, filled with NaN."""
    shards = side.of_rank(rank).shards.values()
    weights = LocalWeights(new_shard(shard.tensor, box, CPU) for shard in shards for box in shard.boxes)
    oracle.poison(weights)
    return weights


def whole(side: Sharding, ranks: list[LocalWeights], key: str) -> torch.Tensor:
    found = torch.full(side.tensors[key].shape, float("nan"))
    for weights in ranks:
        for shard in weights:
            if shard.tensor.key == key:
                found[tuple(slice(a, b) for a, b in zip(shard.box.offsets, shard.box.ends, strict=True))] = (
                    shard.view.float()
                )
    return found


def check(side: Sharding, ranks: list[LocalWeights], found: Contents) -> None:
    """The oracle's own reader finds the same in every shard."""
    for weights in ranks:
        verdict = oracle.check(weights, side.tensors, 3, part=FileValues(found))
        assert verdict.num_compared == sum(shard.box.volume for shard in weights)
        assert verdict.num_wrong == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_hold_what_the_files_have(tmp_path: Path, tp: int) -> None:
    checkpoint(tmp_path, QWEN3_MOE)
    tensors, found, side = tensors_of(tmp_path), contents(tmp_path, QWEN3_MOE), sharding(QWEN3_MOE, tp)
    ranks = [empty(side, rank) for rank in range(tp)]
    read = [load(weights, found) for weights in ranks]
    prefix = "model.layers.0."
    fc1 = whole(side, ranks, f"{LAYERS}mlp.experts.experts.linear_fc1.weight")
    for expert in range(4):
        names = [f"{prefix}mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up")]
        assert torch.equal(fc1[expert], torch.cat([tensors[name] for name in names]).float())
    # Of each of 2 query groups: 2 queries, the key, the value.
    qkv = whole(side, ranks, f"{LAYERS}self_attention.linear_qkv.weight").view(2, 64, 64)
    q, k, v = (tensors[f"{prefix}self_attn.{name}_proj.weight"].float().view(2, -1, 64) for name in "qkv")
    assert torch.equal(qkv, torch.cat([q, k, v], 1))
    embedding = whole(side, ranks, "embedding.word_embeddings.weight")
    assert torch.equal(embedding[:96], tensors["model.embed_tokens.weight"].float())
    assert not embedding[96:].any()  # Megatron pads the vocabulary
    assert embedding.shape[0] > 96
    check(side, ranks, found)
    weights_bytes = sum(shard.box.volume * 2 for weights in ranks for shard in weights)
    assert sum(read) < 2 * weights_bytes  # rows of 128 bytes are read whole where they are cut


def test_the_oracle_finds_what_was_not_read_or_read_elsewhere(tmp_path: Path) -> None:
    checkpoint(tmp_path, QWEN3_MOE)
    found, side = contents(tmp_path, QWEN3_MOE), sharding(QWEN3_MOE, 2)
    weights = empty(side, 1)
    load(weights, found)
    shard = next(shard for shard in weights if shard.tensor.key.endswith("linear_fc2.weight"))
    shard.view[..., [3, 4]] = shard.view[..., [4, 3]].clone()
    verdict = oracle.check(weights, side.tensors, 0, part=FileValues(found))
    assert [wrong.key for wrong in verdict.wrong] == [shard.tensor.key]
    assert (
        oracle.check(weights, side.tensors, 0, sample=True, part=FileValues(found)).num_compared < verdict.num_compared
    )


@pytest.mark.parametrize("block", [(128, 128), (32, 40), (7, 64)])
def test_block_fp8_is_multiplied_by_the_scales_of_its_own_blocks(tmp_path: Path, block: tuple[int, int]) -> None:
    """Blocks at the end are smaller, and a rank's rows begin within one."""
    checkpoint(tmp_path / "bf16", QWEN3_MOE)
    expected = as_block_fp8(tmp_path / "bf16", tmp_path / "fp8", block)
    found, side = contents(tmp_path / "fp8", QWEN3_MOE), sharding(QWEN3_MOE, 2, Dtype.FP32)
    ranks = [empty(side, rank) for rank in range(2)]
    for weights in ranks:
        load(weights, found)
    fc1 = whole(side, ranks, f"{LAYERS}mlp.experts.experts.linear_fc1.weight")
    down = whole(side, ranks, f"{LAYERS}mlp.experts.experts.linear_fc2.weight")
    for expert in range(4):
        prefix = f"model.layers.0.mlp.experts.{expert}."
        assert torch.equal(fc1[expert], torch.cat([expected[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")]))
        assert torch.equal(down[expert], expected[f"{prefix}down_proj.weight"])
    output = whole(side, ranks, f"{LAYERS}self_attention.linear_proj.weight")
    assert torch.equal(output, expected["model.layers.0.self_attn.o_proj.weight"])
    check(side, ranks, found)


def test_buffers_and_latent_attention(tmp_path: Path) -> None:
    checkpoint(tmp_path, DEEPSEEK_V3)
    tensors, found, side = tensors_of(tmp_path), contents(tmp_path, DEEPSEEK_V3), sharding(DEEPSEEK_V3, 2)
    ranks = [empty(side, rank) for rank in range(2)]
    for weights in ranks:
        load(weights, found)
    bias = whole(side, ranks, "decoder.layers.1.mlp.router.expert_bias")
    assert torch.equal(bias, tensors["model.layers.1.mlp.gate.e_score_correction_bias"])
    check(side, ranks, found)


def test_values_are_rounded_as_the_source_holds_them(tmp_path: Path) -> None:
    """Float32 in the files, float16 in the source, bfloat16 in what is quantised: rounded twice."""
    checkpoint(tmp_path, QWEN3_MOE, torch.float32)
    found, side = contents(tmp_path, QWEN3_MOE, Dtype.FP16), sharding(QWEN3_MOE, 1, Dtype.FP16)
    assert found.notes == ("24 tensors are float32 in the files, and have the source's dtypes in it",)
    weights = empty(side, 0)
    load(weights, found)
    bf16: dict[str, TensorSpec] = {key: replace(spec, dtype="bfloat16") for key, spec in side.tensors.items()}
    cast = LocalWeights(new_shard(bf16[shard.tensor.key], shard.box, CPU) for shard in weights)
    for shard, other in zip(weights, cast, strict=True):
        other.view.copy_(shard.view)
    part = FileValues(found, torch.float16)
    assert oracle.check(weights, side.tensors, 0, part=part).num_wrong == 0
    assert oracle.check(cast, bf16, 0, part=part).num_wrong == 0
