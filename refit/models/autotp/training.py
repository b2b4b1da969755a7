"""Trains a DeepSpeedEngine: its forward pass, backward pass, gradient accumulation and ZeRO optimizer."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.config.steps import StepSettings
from refit.models.autotp.engine import load_deepspeed
from refit.models.autotp.groups import ParallelGroups, told_to
from refit.models.autotp.weights import metadata_of
from refit.models.huggingface.training import TrainingGroups, TransformersTrainer
from refit.models.sharded_model import Recorder, StepReport, vocabulary_text


class AutotpTrainer(TransformersTrainer):
    """The `Trainer` of an AutoTP side. The engine's config has the batch, the accumulation and the clipping.

    DeepSpeed asks for its groups in every step, so every call of it runs with the side's.
    """

    def __init__(
        self, engine: Any, groups: ParallelGroups, side: SideSpec, steps: StepSettings, device: torch.device
    ) -> None:
        super().__init__(engine, engine.module, TrainingGroups(groups.side, groups.tp), side, steps, device)
        self._groups, self._deepspeed = groups, load_deepspeed(device)
        self.optimizer = f"DeepSpeed {type(engine.optimizer).__name__}, ZeRO stage {engine.zero_optimization_stage()}"
        self.optimizer += " (torch AdamW)"
        output = metadata_of(engine.module.lm_head.weight)
        self._columns: list[int] = output["partition_sizes"] if output is not None else []
        parts = ["output layer", "loss (DeepSpeed's vocab_parallel_cross_entropy)"]
        is_split = metadata_of(engine.module.get_input_embeddings().weight) is not None
        parts = ["embedding", *parts] if is_split else parts
        besides = "" if is_split else "the embedding is whole on every rank: DeepSpeed splits a tied one only"
        self.vocabulary = vocabulary_text(side.layout.tp, *parts, besides=besides)

    def weights_changed(self) -> None:
        refresh = getattr(self._module.optimizer, "refresh_fp32_params", None)
        if refresh is not None:  # at stage 0 in float32 the parameters are all there is
            refresh()

    def step(self, tokens: torch.Tensor, recorder: Recorder | None = None) -> StepReport:
        with self._running():
            return super().step(tokens, recorder)

    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self._module(input_ids=inputs).logits
        if self._layout.tp == 1:
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        # Stated, since DeepSpeed refuses to guess uneven parts.
        begin, end = sum(self._columns[: self._groups.tp.rank()]), sum(self._columns[: self._groups.tp.rank() + 1])
        loss: torch.Tensor = self._deepspeed.sequence.vocab_parallel_cross_entropy(
            logits,
            labels,
            tp_group=self._groups.tp,
            vocab_start_index=begin,
            vocab_end_index=end,
            global_vocab_size=sum(self._columns),
        )
        return loss

    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._module.backward(loss)
        if not is_last:
            self._module.step()  # counts the micro-batch, and no more

    def _update(self) -> StepReport:
        self._module.step()
        norm = self._module.get_global_grad_norm()
        if self._module.was_step_applied():
            return StepReport(grad_norm=float(norm) if norm is not None else None)
        # DeepSpeed skips steps whose gradients are not finite in every dtype. Only float16 has overflows to skip.
        skipped = self._side.compute_dtype is Dtype.FP16
        return StepReport(grad_norm=None if skipped else math.inf, skipped=skipped)

    def _running(self) -> contextlib.AbstractContextManager[None]:
        return told_to(self._deepspeed, self._groups)
