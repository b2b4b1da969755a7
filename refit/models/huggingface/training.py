"""Training steps of a transformers model, as far as they do not depend on the library that has split it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from refit.config.side import SideSpec
from refit.config.steps import Recompute, StepSettings
from refit.models.huggingface.expert_bias import ExpertBiases
from refit.models.huggingface.rotary_key import sum_rotary_key_gradients
from refit.models.micro_batches import micro_batches
from refit.models.sharded_model import Recorder, StepReport, part


@dataclass(frozen=True, slots=True)
class TrainingGroups:
    """This rank's groups: all ranks of the side, and those that split each layer."""

    side: dist.ProcessGroup
    tp: dist.ProcessGroup


class TransformersTrainer(ABC):
    """The `Trainer` of a transformers model on this rank."""

    optimizer: str
    vocabulary: str

    def __init__(
        self, module: Any, model: Any, groups: TrainingGroups, side: SideSpec, steps: StepSettings, device: torch.device
    ) -> None:
        """`module` is what is called: the transformers `model`, or its library's engine around it."""
        self._module, self._side, self._steps, self._device = module, side, steps, device
        self._layout = side.layout
        recompute_layers(model, steps.recompute)
        sum_rotary_key_gradients(model, groups.tp)
        self._expert_biases = ExpertBiases(model, groups.side)

    @abstractmethod
    def weights_changed(self) -> None:
        """Take over weights that were written from outside. Collective: every rank of the side."""

    @abstractmethod
    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of a micro-batch, `inputs` and `labels` `[micro_batch_size, seq_length]`."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradients of a micro-batch's loss; with the last one they are summed over the replicas."""

    @abstractmethod
    def _update(self) -> StepReport:
        """Clip the gradients, take the optimizer's step, clear the gradients. Returns the report without its loss."""

    def step(self, tokens: torch.Tensor, recorder: Recorder | None = None) -> StepReport:
        self._module.train()
        try:
            return self._step(tokens.to(self._device), recorder)
        finally:
            self._module.eval()

    def close(self) -> None:  # noqa: B027 - nothing to do is what all of them do
        """Nothing here outlives the process groups."""

    def _step(self, tokens: torch.Tensor, recorder: Recorder | None) -> StepReport:
        batches, losses = micro_batches(tokens, self._layout, self._steps.micro_batch_size), []
        for number, batch in enumerate(batches, start=1):
            with part(recorder, "forward"):
                loss = self._loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            losses.append(loss.detach())
            with part(recorder, "backward"):
                self._backward(loss, is_last=number == len(batches))
        with part(recorder, "optimizer"):
            self._expert_biases.update()
            report = self._update()
        return replace(report, loss=float(torch.stack(losses).mean()))


def recompute_layers(model: Any, recompute: Recompute) -> None:
    """Have the backward pass compute layers again from their inputs: all (`uniform`), or the first ones (`block`)."""
    if recompute.granularity is None:
        return
    layers = model.model.layers
    again = layers[: recompute.num_layers] if recompute.method == "block" else layers
    for layer in again:
        # The attributes of transformers' GradientCheckpointingLayer. No layer draws random numbers.
        layer._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
        layer.gradient_checkpointing = True


def adamw(parameters: Iterable[torch.nn.Parameter], steps: StepSettings, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW for parameters that are on `device` when it steps.

    Weight decay follows Megatron-Core's default rule: vectors (norms, biases) have none. On GPUs it is fused: torch's
    default there takes as much memory again as all parameters in float32.
    """
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": steps.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=steps.lr, fused=device.type == "cuda" or None)
