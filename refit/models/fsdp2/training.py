"""Trains a transformers model whose parameters are DTensors: FSDP2's backward pass, torch's AdamW."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from refit.config.layout import Layout
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.config.steps import LOSS_SCALE_WINDOW, StepSettings
from refit.models.fsdp2.experts import experts_of
from refit.models.fsdp2.meshes import Meshes
from refit.models.huggingface.autocast import autocast
from refit.models.huggingface.training import TrainingGroups, TransformersTrainer, adamw
from refit.models.sharded_model import StepReport, vocabulary_text

PARTIAL = "replicated_with_grad_allreduce"
"""In transformers' plan: a whole parameter that each rank of a TP group applies to its heads alone."""


@dataclass(frozen=True, slots=True)
class _Part:
    """This rank's part of a parameter. `main` is its float32 copy, of float32 parameters the same memory.

    `num_copies` ranks of the side hold the same part. `is_partial`: its gradient is to be summed over TP.
    FSDP2 takes the mean over its shards' gradients; each of these has the tokens of `token_ranks` ranks.
    """

    parameter: DTensor
    main: torch.nn.Parameter
    num_copies: int
    is_partial: bool
    token_ranks: int

    @property
    def local(self) -> torch.Tensor:
        return self.parameter.to_local().detach()

    def take_gradient(self) -> None:
        gradient = self.parameter.grad
        assert isinstance(gradient, DTensor), "FSDP2 has summed no gradient"
        self.main.grad = gradient.to_local().to(torch.float32).div_(self.token_ranks)
        self.parameter.grad = None

    def copy_back(self) -> None:
        if self.parameter.dtype is not torch.float32:
            self.local.copy_(self.main)


class Fsdp2Trainer(TransformersTrainer):
    """The `Trainer` of an FSDP2 side. Gradients are added up on each replica, and summed with the last micro-batch."""

    optimizer = "torch AdamW on float32 copies of the sharded parameters"

    def __init__(
        self,
        module: Any,
        meshes: Meshes,
        group: dist.ProcessGroup,
        side: SideSpec,
        steps: StepSettings,
        device: torch.device,
    ) -> None:
        """`group` has all ranks of the side. Collective: every rank of it."""
        groups = TrainingGroups(group, meshes.tp.get_group())
        super().__init__(module, module, groups, side, steps, device)
        self._groups = groups
        self._parts = [*_parts(module, side.layout)]
        self._adamw = adamw((part.main for part in self._parts), steps, device)
        self._scaler = torch.amp.GradScaler(
            device.type,
            init_scale=steps.initial_loss_scale,
            growth_interval=LOSS_SCALE_WINDOW,
            enabled=side.compute_dtype is Dtype.FP16,
        )
        self.vocabulary = vocabulary_text(side.layout.tp, "embedding", "output layer", "loss (torch's loss_parallel)")

    def weights_changed(self) -> None:
        with torch.no_grad():
            for part in self._parts:
                part.main.copy_(part.local)

    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with autocast(self._side, self._device):
            logits = self._module(input_ids=inputs).logits.flatten(0, 1).float()
        with self._parallel():
            loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, labels.flatten())
        return loss

    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._module.set_requires_gradient_sync(is_last)
        with self._parallel():
            part = loss / self._steps.num_microbatches(self._layout.dp)
            self._scaler.scale(part).backward()  # type: ignore[no-untyped-call]

    def _parallel(self) -> contextlib.AbstractContextManager[None]:
        return loss_parallel() if self._layout.tp > 1 else contextlib.nullcontext()

    @torch.no_grad()
    def _update(self) -> StepReport:
        for part in self._parts:
            part.take_gradient()
            if part.is_partial:
                dist.all_reduce(part.main.grad, group=self._groups.tp)
        scale = self._scaler.get_scale()
        norm = self._norm() / scale
        overflow = self._scaler.is_enabled() and not math.isfinite(norm)
        if overflow:  # on one rank is overflow on all: the scaler of each looks at its own gradients
            self._parts[0].main.grad = torch.full_like(self._parts[0].main, math.inf)
        self._scaler.unscale_(self._adamw)
        limit = self._steps.clip_grad
        if limit and norm > limit:
            for part in self._parts:
                assert part.main.grad is not None
                part.main.grad.mul_(limit / (norm + 1e-6))
        self._scaler.step(self._adamw)
        self._scaler.update()
        self._adamw.zero_grad()
        for part in self._parts:
            part.copy_back()
        return StepReport(grad_norm=None if overflow else norm, skipped=overflow)

    def _norm(self) -> float:
        """The gradients' norm over the whole model, each element counted once."""
        squares = [
            part.main.grad.square().sum() / part.num_copies for part in self._parts if part.main.grad is not None
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total, group=self._groups.side)
        return math.sqrt(float(total))


def _parts(module: Any, layout: Layout) -> Iterator[_Part]:
    patterns = [name for name, style in (module._tp_plan or {}).items() if style == PARTIAL]
    routed = {id(parameter) for experts in experts_of(module) for parameter in experts.parameters()}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        num_parts = math.prod(mesh.size(dim) for dim, each in enumerate(placements) if not each.is_replicate())
        is_partial = layout.tp > 1 and any(fnmatch.fnmatch(name, f"{pattern}.*") for pattern in patterns)
        main = torch.nn.Parameter(parameter.to_local().detach().to(torch.float32))
        token_ranks = layout.ep if id(parameter) in routed else 1
        yield _Part(parameter, main, layout.world_size // num_parts, is_partial, token_ranks)
