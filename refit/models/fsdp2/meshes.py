"""The device meshes of one FSDP2 side, on any consecutive ranks of the job."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from refit.config.side import SideSpec
from refit.models.process_groups import own_group
from refit.predict.fsdp2 import Mesh


@dataclass(frozen=True, slots=True)
class Meshes:
    """This rank's meshes: `dense` [replicate, shard, tp] and `experts` [replicate, shard, ep] of the same ranks."""

    dense: DeviceMesh
    experts: DeviceMesh

    @property
    def tp(self) -> DeviceMesh:
        return self.dense["tp"]

    @property
    def ep(self) -> DeviceMesh:
        return self.experts["ep"]

    @property
    def dense_shards(self) -> DeviceMesh:
        """What `fully_shard` takes for dense modules: [shard], with HSDP [replicate, shard]."""
        return _shards(self.dense)

    @property
    def expert_shards(self) -> DeviceMesh:
        return _shards(self.experts)


def _shards(mesh: DeviceMesh) -> DeviceMesh:
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def build_meshes(side: SideSpec, device: torch.device) -> Meshes | None:
    """The meshes of `side`, or None on a rank outside it. Groups come from the cache of `refit.models.process_groups`.

    Collective: every rank of the default group, with the same sides in the same order.
    """
    mesh = Mesh.of(side)
    dense = _device_mesh(side.ranks, mesh.dense_sizes, "tp", device)
    experts = _device_mesh(side.ranks, mesh.expert_sizes, "ep", device)
    return Meshes(dense, experts) if dense is not None and experts is not None else None


def _device_mesh(ranks: range, sizes: tuple[int, int, int], inner: str, device: torch.device) -> DeviceMesh | None:
    grid = np.array(ranks).reshape(sizes)
    groups = []
    for dim, size in enumerate(sizes):
        lines = np.moveaxis(grid, dim, -1).reshape(-1, size)
        groups.append(own_group([[int(rank) for rank in line] for line in lines]))
    if dist.get_rank() not in ranks:
        return None
    own = [group for group in groups if group is not None]
    names = ("replicate", "shard", inner)
    return DeviceMesh.from_group(own, device.type, torch.from_numpy(grid), mesh_dim_names=names)
