"""Shardings as 2-D meshes of contiguous ranks, in which mesh-based libraries describe a tensor.

Such a mesh has one axis that shards a dim of the tensor into equal parts and one that replicates the parts, and its
ranks are numbered row by row. NCCL's nccl_m2n takes one for each side (`ncclMesh_t` and `placements` of nccl_m2n.h).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from refit.plan.box import Box
from refit.plan.sharding import Sharding, TensorSharding, TensorSpec
from refit.plan.tensor_class import TensorClass, tensor_classes

Held = Mapping[int, Box]
"""Rank -> the one box that it holds."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks `first_rank` to `first_rank + dims[0] * dims[1] - 1`, row-major in a mesh of shape `dims`.

    Mesh axis `shard_axis` cuts tensor dim `dim` into `dims[shard_axis]` equal parts, the other axis replicates them.
    """

    first_rank: int
    dims: tuple[int, int]
    shard_axis: int
    dim: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + math.prod(self.dims))

    @property
    def num_shards(self) -> int:
        return self.dims[self.shard_axis]

    def shard_of(self, rank: int) -> int:
        """The number of the part that `rank` holds, along `dim`."""
        return divmod(rank - self.first_rank, self.dims[1])[self.shard_axis]

    def local_extents(self, region: Box) -> tuple[int, ...]:
        """The shape of every rank's part of `region`, whose dim `dim` the shards divide."""
        extents = list(region.extents)
        extents[self.dim] //= self.num_shards
        return tuple(extents)

    def box_of(self, rank: int, region: Box) -> Box:
        """The part of `region` that `rank` holds."""
        size = self.local_extents(region)[self.dim]
        begin = region.offsets[self.dim] + self.shard_of(rank) * size
        return region.narrow(self.dim, begin, begin + size)

    def boxes(self, region: Box) -> dict[int, Box]:
        """Rank -> its part of `region`."""
        return {rank: self.box_of(rank, region) for rank in self.ranks}


@dataclass(frozen=True, slots=True)
class Reshard:
    """`region` of one tensor, from the ranks of one mesh to those of another."""

    region: Box
    source: Mesh
    destination: Mesh

    def local_bytes(self, itemsize: int) -> int:
        """The most bytes that a rank holds of the region."""
        return itemsize * max(math.prod(mesh.local_extents(self.region)) for mesh in (self.source, self.destination))

    @property
    def fan_in(self) -> int:
        """The most source shards that overlap one destination shard."""
        return _overlaps(self.source, self.destination)

    @property
    def fan_out(self) -> int:
        """The most destination shards that overlap one source shard."""
        return _overlaps(self.destination, self.source)


@dataclass(frozen=True, slots=True)
class MeshLimits:
    """What a library takes: dtypes, tensor dims, shards that overlap one shard, and bytes of a region on one rank."""

    dtypes: frozenset[str]
    max_dims: int
    max_fan_in: int
    max_fan_out: int
    max_local_bytes: int


@dataclass(frozen=True, slots=True)
class MeshRefit:
    """A refit in terms of meshes: by tensor key its reshards, or why it has none. A key is in one of the two."""

    reshards: Mapping[str, tuple[Reshard, ...]]
    not_expressible: Mapping[str, str]


def mesh_refit(source: Sharding, destination: Sharding, limits: MeshLimits) -> MeshRefit:
    """Express each tensor of two sides, which hold the same ones, in reshards that write every destination element.

    Tensors that share a geometry share their reshards.
    """
    reshards: dict[str, tuple[Reshard, ...]] = {}
    refused: dict[str, str] = {}
    shared = not set(source.ranks).isdisjoint(destination.ranks)
    for tensors in tensor_classes((source, destination)):
        found = "both sides share ranks" if shared else _class_reshards(tensors, limits)
        for tensor in tensors.tensors:
            answer = _difference(source.tensors[tensor.key], tensor) or found
            if isinstance(answer, str):
                refused[tensor.key] = answer
            else:
                reshards[tensor.key] = answer
    return MeshRefit(reshards, refused)


def mesh_of(held: Held, region: Box) -> Mesh | None:
    """The mesh under which each rank of `held` has just the box that `held` gives; None where there is none."""
    first, num_ranks = min(held), len(held)
    parts = set(held.values())
    cut = [dim for dim, extent in enumerate(region.extents) if any(box.extents[dim] != extent for box in parts)]
    if len(cut) > 1 or num_ranks % len(parts) or (cut and region.extents[cut[0]] % len(parts)):
        return None
    num_replicas, dim = num_ranks // len(parts), cut[0] if cut else 0
    candidates = (Mesh(first, (num_replicas, len(parts)), 1, dim), Mesh(first, (len(parts), num_replicas), 0, dim))
    return next((mesh for mesh in candidates if mesh.boxes(region) == held), None)


def _difference(source: TensorSpec, destination: TensorSpec) -> str | None:
    if source.dtype != destination.dtype:
        return "the dtype changes"
    return None if source.shape == destination.shape else "the sides pad it to different shapes"


def _class_reshards(tensors: TensorClass, limits: MeshLimits) -> tuple[Reshard, ...] | str:
    """The reshards of each tensor of a class, or why there are none."""
    tensor = tensors.tensors[0]
    if tensor.dtype not in limits.dtypes:
        return f"its dtype is {tensor.dtype}"
    if not 1 <= len(tensor.shape) <= limits.max_dims:
        return f"it has {len(tensor.shape)} dims"
    found: list[Reshard] = []
    sources, destinations = (_in_memory(tensor, side) for side in (tensors.source, tensors.destination))
    for turn, (memory, received) in enumerate(destinations.items()):
        reshards = _memory_reshards(memory, sources.get(memory, {}), received, turn)
        if not reshards:
            return "no mesh of contiguous ranks describes it"
        found += reshards
    for name, limit, largest in (
        ("source shards overlap a destination shard", limits.max_fan_in, max(each.fan_in for each in found)),
        ("destination shards overlap a source shard", limits.max_fan_out, max(each.fan_out for each in found)),
        ("bytes of it are on one rank", limits.max_local_bytes, max(e.local_bytes(tensor.itemsize) for e in found)),
    ):
        if largest > limit:
            return f"{largest:,} {name}, {limit:,} at most are possible"
    return tuple(found)


def _in_memory(tensor: TensorSpec, sharding: TensorSharding) -> dict[Box, dict[int, list[Box]]]:
    """The boxes of each rank, by the tensor in memory that they are in: one per index of a stacked dim 0."""
    whole = Box.whole(tensor.shape)
    held: dict[Box, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for shard in sharding.shards:
        for box in tensor.memory_boxes(shard.box):
            memory = whole.narrow(0, box.offsets[0], box.ends[0]) if tensor.stacked else whole
            for rank in shard.ranks:
                held[memory][rank].append(box)
    return held


def _memory_reshards(
    memory: Box, source: Mapping[int, list[Box]], destination: Mapping[int, list[Box]], turn: int
) -> list[Reshard]:
    """The reshards of one tensor in memory; empty where one of its regions has none.

    Source replicas take turns, from number `turn` on.
    """
    found: list[Reshard] = []
    for region in _regions(memory, source, destination):
        senders, receivers = (_within(region, side) for side in (source, destination))
        if not senders or not receivers:
            return []
        to, sides = _meshes_of_all(receivers, region), _some_meshes(senders, region)
        if not to or not sides:
            return []
        found += [Reshard(region, sides[number % len(sides)], mesh) for number, mesh in enumerate(to, turn)]
    return found


def _regions(memory: Box, *sides: Mapping[int, list[Box]]) -> Sequence[Box]:
    """The parts of a tensor that ranks hold one box of each: gate and up where a side shards them apart."""
    return max((_hulls(held) for held in sides), key=len) or [memory]


def _hulls(held: Mapping[int, list[Box]]) -> list[Box]:
    """The hull of every rank's first box, of every rank's second one, and so on; empty where ranks differ in number."""
    if len({len(boxes) for boxes in held.values()}) != 1:
        return []
    return [_hull(boxes) for boxes in zip(*(sorted(boxes) for boxes in held.values()), strict=True)]


def _hull(boxes: Sequence[Box]) -> Box:
    offsets = tuple(map(min, zip(*(box.offsets for box in boxes), strict=True)))
    ends = tuple(map(max, zip(*(box.ends for box in boxes), strict=True)))
    return Box(offsets, tuple(end - begin for begin, end in zip(offsets, ends, strict=True)))


def _within(region: Box, held: Mapping[int, list[Box]]) -> Held | None:
    """Each rank's part of `region`; None where one holds several, or one with gaps in memory."""
    parts: dict[int, Box] = {}
    for rank, boxes in held.items():
        for box in boxes:
            part = box.intersect(region)
            if part is None:
                continue
            if rank in parts or not part.is_contiguous_within(box):
                return None
            parts[rank] = part
    return parts


def _meshes_of_all(held: Held, region: Box) -> list[Mesh]:
    """A mesh for each run of consecutive ranks, which together are all of `held`; empty where a run has none."""
    meshes = [mesh_of(run, region) for run in _runs(held)]
    found = [mesh for mesh in meshes if mesh is not None]
    return found if len(found) == len(meshes) else []


def _some_meshes(held: Held, region: Box) -> list[Mesh]:
    """The meshes of those runs of consecutive ranks that hold all of the region: any of them can send it."""
    return [mesh for run in _runs(held) if (mesh := mesh_of(run, region)) is not None]


def _runs(held: Held) -> Iterator[Held]:
    """`held` by runs of consecutive ranks."""
    run: dict[int, Box] = {}
    for rank in sorted(held):
        if run and rank - 1 not in run:
            yield run
            run = {}
        run[rank] = held[rank]
    if run:
        yield run


def _overlaps(cut: Mesh, by: Mesh) -> int:
    """The most shards of `cut` that overlap one shard of `by`."""
    parts, others = cut.num_shards, by.num_shards
    if cut.dim != by.dim:
        return parts
    return max(-(-(number + 1) * parts // others) - number * parts // others for number in range(others))
