"""Expert parallelism for the fused experts of transformers: experts split over a mesh, tokens gathered for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def split_over_experts(modules: Iterable[torch.nn.Module], mesh: DeviceMesh) -> None:
    """Split dim 0 of every parameter, the experts, over `mesh`. Parameters are on the meta device."""
    if mesh.size() == 1:
        return
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, torch.nn.Parameter(split))
        module.forward = _Forward(module, mesh)


class _Forward:
    """The forward pass of a module of experts whose parameters are split over `mesh`. For inference."""

    def __init__(self, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        self._module = module
        self._group, self._rank, self._size = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`hidden` `[tokens, hidden]`, `index` and `weights` `[tokens, topk]`: weighted outputs like `hidden`.

        Every rank computes its experts for the tokens of all, and the outputs are summed. Collective: every rank of
        the mesh, with equally many tokens.
        """
        all_hidden, all_index, all_weights = (self._gathered(part) for part in (hidden, index, weights))
        local = _LocalExperts(self._module)
        first = self._rank * local.num_experts
        own = (all_index >= first) & (all_index < first + local.num_experts)
        # transformers skips the index one past the last expert.
        own_index = torch.where(own, all_index - first, local.num_experts)
        outputs: torch.Tensor = type(self._module).forward(local, all_hidden, own_index, all_weights).contiguous()
        dist.all_reduce(outputs, group=self._group)
        tokens = hidden.size(0)
        return outputs[self._rank * tokens : (self._rank + 1) * tokens]

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self._size)]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts)


class _LocalExperts:
    """A module of experts as its own `forward` sees it, with this rank's experts as plain tensors."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._local = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for name, tensor in module.named_parameters(recurse=False)
        }
        self.num_experts = next(iter(self._local.values())).size(0)

    def __getattr__(self, name: str) -> Any:
        return self._local[name] if name in self._local else getattr(self._module, name)
