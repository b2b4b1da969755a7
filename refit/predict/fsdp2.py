"""What every rank of an FSDP2 side holds, predicted from the flags: no model, no transformers, no torch.

The side is a transformers model under `parallelize_module` (tensor parallelism) and `fully_shard`.

A side's ranks are a mesh [replicate, shard, tp] for dense tensors, tp fastest. Routed experts have the mesh
[replicate, expert shard, ep] of the same ranks, ep fastest. A tensor is split over tp along its rows or columns, or a
routed one over ep along its experts, and then over the shards along dim 0. Both splits are those of `torch.chunk`:
equal parts of ceil(size / parts), the last ones shorter or empty. Buffers are whole on every rank. Parameters have the
side's dtype, but for those that transformers keeps in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from refit.config import limits
from refit.config.flag_names import size_flag
from refit.config.layout import Layout
from refit.config.options import SideOptions, flags_of, side_setting
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.sharding import Sharding
from refit.predict.families.names import NamedTensor, named_model
from refit.predict.families.releases import followed
from refit.predict.families.sharding import check_family, sharding_of
from refit.predict.megatron import Split


@dataclass(frozen=True, slots=True)
class Fsdp2Options(SideOptions):
    """`replicate_size` is the number of replicas of the sharded model (HSDP): 1 shards over all ranks."""

    replicate_size: int = side_setting(
        1,
        source="fsdp-replicate-size",
        destination="rl-inference-fsdp-replicate-size",
        metavar="N",
        most=limits.MAX_RANKS,
        help="replicas of the sharded model (HSDP); default: 1",
    )

    def title(self, layout: Layout) -> str:
        """FSDP is the number of ranks that the dense layers are sharded over, beside TP."""
        hsdp = f" HSDP{self.replicate_size}" if self.replicate_size > 1 else ""
        return f"TP{layout.tp} EP{layout.ep} FSDP{layout.world_size // (layout.tp * self.replicate_size)}{hsdp}"


@dataclass(frozen=True, slots=True)
class Mesh:
    """The sizes of both meshes of a side."""

    replicate: int
    shard: int
    tp: int
    expert_shard: int
    ep: int

    @classmethod
    def of(cls, side: SideSpec) -> Mesh:
        """Raises UsageError, with both numbers, where the ranks cannot be divided into these sizes."""
        layout, replicate = side.layout, side.options_as(Fsdp2Options).replicate_size
        for size, what in (
            (replicate * layout.tp, f"HSDP replicas x TP = {replicate} x {layout.tp}"),
            (replicate * layout.ep, f"HSDP replicas x EP = {replicate} x {layout.ep}"),
        ):
            if layout.world_size % size:
                raise UsageError(f"{layout.world_size} ranks cannot be divided into {what} = {size}")
        ranks = layout.world_size // replicate
        return cls(replicate, ranks // layout.tp, layout.tp, ranks // layout.ep, layout.ep)

    @property
    def dense_sizes(self) -> tuple[int, int, int]:
        return self.replicate, self.shard, self.tp

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        return self.replicate, self.expert_shard, self.ep


def check(shape: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where transformers has no such model or it cannot be sharded so; `name` is the side's."""
    try:
        mesh = Mesh.of(side)
    except UsageError as error:
        place = name == "destination"
        flags = f"{size_flag(name, 'world_size')}, --{flags_of(Fsdp2Options)['replicate_size'].names[place]}"
        raise UsageError(f"{name}: {error} ({flags})") from None
    divisible = [
        (shape.num_attention_heads, mesh.tp, "attention heads", "TP size"),
        (shape.ffn_hidden_size, mesh.tp, "FFN hidden size", "TP size"),
    ]
    if mesh.shard > 1:
        # Of uneven parts that are sharded again, DTensor states other rows than it holds (torch 2.13).
        divisible.append((shape.vocab_size, mesh.tp, "tokens of the vocabulary, sharded by FSDP too,", "TP size"))
    if shape.mla is None:
        divisible.append((shape.num_query_groups, mesh.tp, "query groups", "TP size"))
    if shape.delta_net is not None:  # whose input and output projections have their rows split, as transformers has it
        net = shape.delta_net
        divisible += [
            (2 * (net.key_width + net.value_width), mesh.tp, "rows of delta nets' projections", "TP size"),
            (2 * net.num_value_heads, mesh.tp, "rows of delta nets' rates", "TP size"),
            (shape.hidden_size, mesh.tp, "hidden size, of delta nets,", "TP size"),
        ]
    if shape.experts is not None:
        divisible += [
            (shape.experts.num_experts, mesh.ep, "experts", "EP size"),
            (shape.experts.shared_ffn_hidden_size or mesh.tp, mesh.tp, "shared expert FFN hidden size", "TP size"),
        ]
    elif mesh.ep > 1:
        raise UsageError(f"{name}: EP size {mesh.ep} needs experts: give --num-experts, or {size_flag(name, 'ep')} 1")
    for number, divisor, what, by in divisible:
        if number % divisor:
            raise UsageError(f"{name}: {number} {what} cannot be divided by {by} {divisor}")
    check_family(shape, side, name)


def predict(shape: ModelShape, side: SideSpec) -> Sharding:
    """What every rank of `side` holds, by canonical keys. Raises UsageError as `check` does."""
    check(shape, side, "this layout")
    assert side.dtype is not None, "flags that describe a model give its dtype"
    mesh, model = Mesh.of(side), named_model(shape, side.dtype, release=followed())
    return sharding_of(model, side.ranks, lambda tensor, local: held_box(tensor, mesh, local))


def held_box(tensor: NamedTensor, mesh: Mesh, local: int) -> Box | None:
    """The part of `tensor` that the side's rank number `local` holds; None for an empty one."""
    box: Box | None = Box.whole(tensor.shape)
    split = tensor.row.in_transformers or tensor.row.split
    if tensor.row.buffer:
        return box
    if tensor.row.routed:
        shards, outer, part, dim = mesh.expert_shard, mesh.ep, local % mesh.ep, 0
        shard = local // mesh.ep % mesh.expert_shard
    else:
        shards, outer, part, dim = mesh.shard, mesh.tp, local % mesh.tp, int(split is Split.ROW)
        shard = local // mesh.tp % mesh.shard
        if split is Split.REPLICATED:
            outer = 1
    if outer > 1:
        box = chunk(box, dim, outer, part)
    return chunk(box, 0, shards, shard)


def chunk(box: Box | None, dim: int, parts: int, part: int) -> Box | None:
    """Part number `part` of `torch.chunk(..., parts, dim)`; None for an empty one."""
    if box is None:
        return None
    size = -(-box.extents[dim] // parts)
    begin, end = (min(number * size, box.extents[dim]) for number in (part, part + 1))
    return box.narrow(dim, box.offsets[dim] + begin, box.offsets[dim] + end) if end > begin else None
