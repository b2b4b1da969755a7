"""Trains a built model with Megatron-Core's own schedules, data parallelism and distributed optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from refit.config.steps import LOSS_SCALE_WINDOW, StepSettings
from refit.models.megatron import compat, compat_steps, nccl_ep
from refit.models.megatron.build import BuiltModel
from refit.models.megatron.recording import recorded
from refit.models.micro_batches import micro_batches
from refit.models.sharded_model import Recorder, StepReport, part, vocabulary_text

Loss: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class MegatronTrainer:
    """The `Trainer` of a GPTModel on this rank.

    Megatron's data parallelism moves the parameters into buffers of its own: weights are read after this is built.
    """

    optimizer = "Megatron-Core's distributed optimizer (AdamW)"

    def __init__(self, built: BuiltModel, steps: StepSettings) -> None:
        """Collective: every rank of the model's layout."""
        self._built, self._steps = built, steps
        self.vocabulary = vocabulary_text(built.layout.tp, "embedding", "output layer", "loss")
        config: Any = built.chunks[0].config
        uses_nccl_ep = steps.dispatch.backend == "ncclep"
        self._topk = config.moe_router_topk * built.layout.etp if uses_nccl_ep else None
        with self._running(), compat_steps.gathering_within(built.groups.intra_dist_opt):
            data_parallel = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                # Otherwise a weight's gradient would be added up before its delayed computation.
                delay_wgrad_compute=config.delay_wgrad_compute,
            )
            self._chunks: list[Any] = [
                DistributedDataParallel(
                    chunk.config, data_parallel, chunk, disable_bucketing=number > 0, pg_collection=built.groups
                )
                for number, chunk in enumerate(built.chunks)
            ]
            self._optimizer: Any = get_megatron_optimizer(
                _optimizer_config(config, steps),
                self._chunks,
                use_gloo_process_groups=False,
                pg_collection=built.groups,
            )
            self._communicator = P2PCommunicator(built.groups.pp, config)
        for chunk in built.chunks:
            chunk_config: Any = chunk.config
            chunk_config.finalize_model_grads_func = finalize_model_grads
            chunk_config.grad_scale_func = self._optimizer.scale_loss

    def weights_changed(self) -> None:
        with self._running():
            self._optimizer.reload_model_params()

    def close(self) -> None:
        if self._topk is not None:
            nccl_ep.close()

    def step(self, tokens: torch.Tensor, recorder: Recorder | None = None) -> StepReport:
        with self._running(), recorded(self._built, self._optimizer, recorder):
            for chunk in self._chunks:
                chunk.train()
            try:
                batch = tokens.to(self._built.device)
                return self._step(micro_batches(batch, self._built.layout, self._steps.micro_batch_size), recorder)
            finally:
                for chunk in self._chunks:
                    chunk.eval()

    def _step(self, batches: list[torch.Tensor], recorder: Recorder | None) -> StepReport:
        layout = self._built.layout
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        schedule = get_forward_backward_func(layout.pp, layout.vpp if layout.vpp > 1 else None)
        several = len(self._chunks) > 1
        iterators = [iter(batches) for _ in self._chunks]
        losses: list[torch.Tensor] = schedule(
            forward_step_func=_forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self._chunks if several else self._chunks[0],
            num_microbatches=len(batches),
            seq_length=self._steps.seq_length,
            micro_batch_size=self._steps.micro_batch_size,
            forward_only=False,
            p2p_communicator=self._communicator,
            pg_collection=self._built.groups,
        )
        with part(recorder, "optimizer"):
            updated, grad_norm, _ = self._optimizer.step()
        loss = float(torch.stack(losses).mean()) if losses else None
        return StepReport(loss, float(grad_norm) if updated else None, skipped=not updated)

    def _running(self) -> contextlib.ExitStack:
        built, stack = self._built, contextlib.ExitStack()
        stack.enter_context(compat.running_on(built.groups, built.device, len(built.chunks)))
        stack.enter_context(compat_steps.trainable_on(built.device))
        stack.enter_context(compat_steps.uncompiled_on(built.device))
        stack.enter_context(compat_steps.nccl_ep_starts_for(self._topk))
        return stack


def _optimizer_config(config: Any, steps: StepSettings) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=steps.lr,
        weight_decay=steps.weight_decay,
        clip_grad=steps.clip_grad,
        bf16=config.bf16,
        fp16=config.fp16,
        initial_loss_scale=steps.initial_loss_scale,
        loss_scale_window=LOSS_SCALE_WINDOW,
        hysteresis=1,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )


def _forward_step(batches: Iterator[torch.Tensor], chunk: Any, return_schedule_plan: bool = False) -> tuple[Any, Loss]:
    """The `forward_step_func` of the schedules: the losses `[batch, sequence]`, and what makes one loss of them.

    With `return_schedule_plan`, as the overlapped schedule asks, the plan of the pass in place of its output.
    """
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    if return_schedule_plan:
        whole = chunk if hasattr(chunk, "build_schedule_plan") else chunk.module
        return whole.build_schedule_plan(inputs, positions, None, labels=labels), _mean_loss
    return chunk(inputs, positions, None, labels=labels), _mean_loss


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = losses.float().mean()
    return mean, mean.detach().clone()
