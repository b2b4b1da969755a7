"""Moves the biases by which DeepSeek-V3's routers choose experts, towards equal loads (arXiv:2408.15664)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

UPDATE_RATE = 1e-3
"""Megatron-Core's `moe_router_bias_update_rate` by default."""

BIAS = "e_score_correction_bias"


class ExpertBiases:
    """The biases of a transformers model, which itself leaves them as they are. Models without any have none to move.

    Megatron-Core moves them in `finalize_model_grads`: by the rate up where an expert had fewer tokens than the mean of
    the global batch, down where it had more.
    """

    def __init__(self, model: torch.nn.Module, side: dist.ProcessGroup) -> None:
        """`side` has all ranks: replicas of one batch count its tokens equally often, which changes no comparison."""
        self._side = side
        self._biases: list[torch.Tensor] = []
        self._loads: list[torch.Tensor] = []
        for router in (module for module in model.modules() if hasattr(module, BIAS)):
            bias: torch.Tensor = getattr(router, BIAS)
            self._biases.append(bias)
            self._loads.append(torch.zeros_like(bias))
            getattr(router, "gate", router).register_forward_hook(_counting(self._loads[-1]))

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases by the tokens since the last call. Collective: every rank of the side."""
        if not self._biases:
            return
        loads = torch.stack(self._loads)
        dist.all_reduce(loads, group=self._side)
        for bias, load in zip(self._biases, loads, strict=True):
            bias.add_(torch.sign(load.mean() - load), alpha=UPDATE_RATE)
        for load in self._loads:
            load.zero_()


def _counting(load: torch.Tensor) -> Any:
    """A forward hook that adds the tokens of each expert to `load` `[num_experts]`. Where layers are computed again,
    each token counts twice."""

    def count(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        if router.training:
            chosen = output[2].detach().flatten()
            load.index_add_(0, chosen, load.new_ones(chosen.numel()))  # torch.bincount would wait for the GPU

    return count
