"""Puts a transformers model under `deepspeed.initialize`, split by AutoTP over the ranks of one side."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from refit.config.scenario import Scenario
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.config.steps import LOSS_SCALE_WINDOW, StepSettings
from refit.errors import RefitError
from refit.models.autotp.groups import ParallelGroups, told_to
from refit.models.huggingface.model import compute_rotary_buffers, load_family, materialise, meta_model
from refit.models.huggingface.training import adamw
from refit.predict.autotp import AutotpOptions, is_split
from refit.predict.families.names import NamedModel
from refit.predict.megatron import Split

PRECISION: dict[Dtype, dict[str, Any]] = {
    Dtype.BF16: {"bf16": {"enabled": True}},
    Dtype.FP16: {"fp16": {"enabled": True, "loss_scale_window": LOSS_SCALE_WINDOW, "hysteresis": 1}},
    Dtype.FP32: {},
}


def load_deepspeed(device: torch.device) -> Any:
    """The module `deepspeed`, for sides on `device`."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when it is imported
    import deepspeed

    # Its all-reduce through shared memory is compiled at first use, and waits for all ranks of the job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":  # it refuses fp16 on CPUs without instructions for it, which torch does not need
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def load_libraries(scenario: Scenario, device: torch.device) -> None:
    """Import what a side needs when it is built."""
    load_family(scenario, device)
    load_deepspeed(device)


def whole_model(shape: ModelShape, named: NamedModel, side: SideSpec) -> Any:
    """The model before it is split, in eval mode, its weights uninitialised.

    It is in host memory, where pages take none before they are written: a rank keeps its parts only.
    """
    host = torch.device("cpu")
    model = meta_model(shape, named, side)
    materialise(model, host)
    compute_rotary_buffers(model, host)
    model.eval()
    return model


def build_engine(
    model: Any,
    shape: ModelShape,
    named: NamedModel,
    side: SideSpec,
    groups: ParallelGroups,
    device: torch.device,
    steps: StepSettings | None = None,
) -> Any:
    """The DeepSpeedEngine of this rank's parts of `model`, a whole one; with `steps` for training by those.

    Without a ZeRO stage it has no optimizer, and no buffers beside the weights.

    Collective: every rank of the side. Raises RefitError where DeepSpeed refuses the model.
    """
    deepspeed = load_deepspeed(device)
    optimizer = None
    if _options(side).zero_stage is not None:
        parameters = model.parameters()
        optimizer = adamw(parameters, steps, device) if steps is not None else torch.optim.AdamW(parameters)
    config = {**_config(deepspeed, model, named, shape, side), **_batch(side, steps)}
    if steps is not None:
        config.update(_autocast(side))
    if "fp16" in config and steps is not None:
        config["fp16"] = {**config["fp16"], "initial_scale_power": round(math.log2(steps.initial_loss_scale))}
    try:
        with told_to(deepspeed, groups):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (ValueError, NotImplementedError) as error:
        raise RefitError(f"DeepSpeed cannot split the model: {error}") from error
    if side.layout.tp > 1:
        # It compares the first batch within a TP group, whose first rank it computes as if all ranks were the side's.
        engine.first_dataloader_check.remove()
    return engine


def _config(deepspeed: Any, model: Any, named: NamedModel, shape: ModelShape, side: SideSpec) -> dict[str, Any]:
    assert side.dtype is not None, "flags that describe a model give its dtype"
    specs = [*_split_layers(named, shape), *_summed_gradients(deepspeed, model)]
    return {
        "zero_optimization": {"stage": _options(side).zero_stage or 0},
        "tensor_parallel": {
            "autotp_size": side.layout.tp,
            "vocab_parallel_lm_head": side.layout.tp > 1,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        },
        **PRECISION[side.dtype],
    }


def _options(side: SideSpec) -> AutotpOptions:
    return side.options_as(AutotpOptions)


def _autocast(side: SideSpec) -> dict[str, Any]:
    """DeepSpeed's own autocast. No module is named whose gradients it may reduce in 16 bits: by default those are of
    `torch.nn.Linear`, which AutoTP replaces where it splits them."""
    if side.autocast is None:
        return {}
    return {"torch_autocast": {"enabled": True, "dtype": side.autocast.value, "lower_precision_safe_modules": []}}


def _batch(side: SideSpec, steps: StepSettings | None) -> dict[str, Any]:
    if steps is None:
        return {"train_micro_batch_size_per_gpu": 1}
    return {
        "train_micro_batch_size_per_gpu": steps.micro_batch_size,
        "gradient_accumulation_steps": steps.num_microbatches(side.layout.dp),
        "gradient_clipping": steps.clip_grad,
    }


def _split_layers(named: NamedModel, shape: ModelShape) -> Iterator[dict[str, Any]]:
    """The layers that the family's table splits, as DeepSpeed wants them told. The output layer has its own setting."""
    names = {tensor.name: tensor for block in named.blocks if block.prefix for tensor in block.tensors}
    for name, tensor in names.items():
        if is_split(tensor, shape):
            kind = "row" if tensor.row.split is Split.ROW else "column"
            yield {"patterns": [rf"model\.layers\.\d+\.{re.escape(name)}$"], "partition_type": kind}


def _summed_gradients(deepspeed: Any, model: Any) -> Iterator[dict[str, Any]]:
    """Whole parameters of which each rank computes part of the gradient, as transformers' own plan names them."""
    plan = deepspeed.runtime.tensor_parallel.config._get_hf_tp_plan(model) or {}
    for pattern, style in plan.items():
        if style == "replicated_with_grad_allreduce":
            name = re.escape(pattern).replace(r"\*", r"\d+")
            yield {"patterns": [rf"(model\.)?{name}\.weight$"], "partition_type": "skip", "grad_allreduce": True}
