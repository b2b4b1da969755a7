"""Training steps of a transformers model, as far as they do not depend on the library that has split it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

from refit.config.layout import Layout
from refit.config.steps import StepSettings
from refit.models.micro_batches import micro_batches
from refit.models.sharded_model import Recorder, StepReport, part


class TransformersTrainer(ABC):
    """The `Trainer` of a transformers model on this rank: `module` is what is called, with its library around it."""

    optimizer: str
    vocabulary: str

    def __init__(self, module: Any, layout: Layout, steps: StepSettings, device: torch.device) -> None:
        self._module, self._layout, self._steps, self._device = module, layout, steps, device

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
    def _update(self) -> float | None:
        """Clip the gradients, take the optimizer's step, clear the gradients.

        Returns their norm before clipping, None where the library does not tell.
        """

    def step(self, tokens: torch.Tensor, recorder: Recorder | None = None) -> StepReport:
        self._module.train()
        try:
            return self._step(tokens.to(self._device), recorder)
        finally:
            self._module.eval()

    def _step(self, tokens: torch.Tensor, recorder: Recorder | None) -> StepReport:
        batches, losses = micro_batches(tokens, self._layout, self._steps.micro_batch_size), []
        for number, batch in enumerate(batches, start=1):
            with part(recorder, "forward"):
                loss = self._loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            losses.append(loss.detach())
            with part(recorder, "backward"):
                self._backward(loss, is_last=number == len(batches))
        with part(recorder, "optimizer"):
            norm = self._update()
        return StepReport(float(torch.stack(losses).mean()), norm)


def adamw(parameters: Iterable[torch.nn.Parameter], steps: StepSettings) -> torch.optim.AdamW:
    """torch's AdamW, with Megatron-Core's default rule for weight decay: vectors (norms, biases) have none."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": steps.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=steps.lr)
