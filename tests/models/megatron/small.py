"""Small models for the tests of this package, a process that acts as any rank, and values that encode positions."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from refit.config.layout import Layout
from refit.config.pipeline_layout import pipeline_layout
from refit.config.shape import DeltaNet, Dtype, Experts, LatentAttention, ModelShape
from refit.config.side import SideSpec
from refit.memory.weights import LocalShard, LocalWeights
from refit.models.megatron.build import BuiltModel, build_model
from refit.models.megatron.groups import build_groups
from refit.plan.box import Box

DENSE = ModelShape(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    ffn_hidden_size=96,
    vocab_size=250,
    make_vocab_size_divisible_by=32,
    max_position_embeddings=64,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=False,
    tied_embeddings=False,
    qk_layernorm=False,
    mla=None,
    experts=None,
)
EXPERTS = Experts(
    num_experts=8,
    topk=2,
    ffn_hidden_size=32,
    shared_ffn_hidden_size=48,
    layers=(False, True, True, True),
    expert_bias=True,
    grouped_gemm=True,
)
MLA = LatentAttention(q_lora_rank=32, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8)
MOE = replace(DENSE, experts=EXPERTS)
SEQUENTIAL = replace(DENSE, experts=replace(EXPERTS, grouped_gemm=False))
LATENT = replace(MOE, mla=MLA, qk_layernorm=True)
NETS = DeltaNet(
    num_key_heads=4,
    key_head_dim=6,
    num_value_heads=8,
    value_head_dim=10,
    conv_kernel_dim=4,
    layers=(True, True, False, True),
)
DELTA_NETS = replace(
    MOE,
    qk_layernorm=True,
    delta_net=NETS,
    attention_output_gate=True,
    experts=replace(EXPERTS, expert_bias=False, shared_gate=True),
)
LATENT_EXPERTS = replace(MOE, experts=replace(EXPERTS, shared_ffn_hidden_size=None, latent_size=16))


def layout(
    tp: int = 1, ep: int = 1, etp: int = 1, pp: int = 1, world: int | None = None, first: int = 0, vpp: int = 1
) -> Layout:
    return Layout(tp=tp, ep=ep, etp=etp, pp=pp, world_size=world or tp * ep * pp, first_rank=first, vpp=vpp)


def written(text: str, vpp: int = 1, tp: int = 1, ep: int = 1, world: int | None = None) -> Layout:
    """The layout that `--pipeline-model-parallel-layout` gives in this text."""
    read = pipeline_layout(text)
    pp = len(read.layers) // vpp
    sizes = {"chunk_sizes": read.layers, "chunk_predictions": read.predictions}
    return Layout(tp=tp, ep=ep, etp=tp, pp=pp, world_size=world or tp * ep * pp, vpp=vpp, **sizes)  # type: ignore[arg-type]


@contextlib.contextmanager
def playing(rank: int, world_size: int) -> Iterator[None]:
    """Act as `rank` of a fake process group, in which collectives return at once and move nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def built(shape: ModelShape, where: Layout, dtype: Dtype = Dtype.FP32) -> BuiltModel | None:
    return build_model(shape, spec(where, dtype), build_groups(where, shape), device="cpu")


def spec(where: Layout, dtype: Dtype = Dtype.FP32) -> SideSpec:
    return SideSpec(where, dtype=dtype)


def content(key: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
    """Values of a box of a global tensor, float32: a function of only the key and the logical index."""
    index = torch.zeros(box.extents, dtype=torch.int64)
    for dim, (offset, extent) in enumerate(zip(box.offsets, box.extents, strict=True)):
        places = torch.arange(offset, offset + extent).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        index = index * shape[dim] + places
    mixed = (index * 2654435761 + zlib.crc32(key.encode())) % 1000003
    values = mixed.float() / 1000003 - 0.5
    return 1.0 + values if key.endswith("norm.weight") else values * 0.3


def fill(memory: LocalWeights) -> None:
    for shard in memory:
        shard.view.copy_(content(shard.tensor.key, shard.tensor.shape, shard.box))


def wrong(memory: LocalWeights) -> dict[str, int]:
    """Number of elements that differ from `content`, by key."""

    def count(shard: LocalShard) -> int:
        expected = content(shard.tensor.key, shard.tensor.shape, shard.box).to(shard.view.dtype)
        return int((shard.view != expected).sum())

    counts: dict[str, int] = {}
    for shard in memory:
        counts[shard.tensor.key] = counts.get(shard.tensor.key, 0) + count(shard)
    return {key: number for key, number in counts.items() if number}
