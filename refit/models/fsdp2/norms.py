"""Tensor parallelism for norms of queries and keys that run over all heads."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from refit.models.norm_of_parts import norm_of_parts


class NormOfParts(ParallelStyle):
    """Splits the weight of an RMS norm over a mesh; each rank normalises its part by the mean of all."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        weight = distribute_tensor(module.weight.data, device_mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter("weight", torch.nn.Parameter(weight))
        module.forward = _Forward(module, device_mesh)
        return module


class _Forward:
    def __init__(self, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        self._module, self._group = module, mesh.get_group()

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        """Collective: every rank of the mesh, with its part `[..., width]`."""
        weight = self._module.weight
        return norm_of_parts(part, weight.to_local() if isinstance(weight, DTensor) else weight, self._group)
