"""Builds a transformers model for a side on the meta device, and gives it memory."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.models.huggingface.autocast import EXPERTS
from refit.predict.families.config_json import config_values
from refit.predict.families.names import NamedModel

GROUPED = {"experts_implementation": "grouped_mm"}
"""All experts of a layer in one product. One by one ("eager"), each would allocate the gradient of all of them."""


def load_family(scenario: Scenario, device: torch.device) -> None:
    """Import the module of the scenario's model family, which transformers does when a model is built."""
    assert scenario.model is not None, "such sides build no model of a provider"
    family = config_values(scenario.model)["model_type"]
    import_module(f"transformers.models.{family}.modeling_{family}")


def meta_model(shape: ModelShape, named: NamedModel, side: SideSpec) -> Any:
    """The whole model on the meta device, with the side's attention and the dtypes of the named tensors."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    experts = GROUPED if shape.experts is not None else {}
    values = config_values(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values, use_cache=False)
    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        dtype = getattr(torch, side.dtype.value)
        attention = "eager" if named.family.eager_attention else side.attn_impl
        model = build(config, dtype=dtype, attn_implementation=attention, **experts)
    if side.autocast is not None and experts:
        model.config._experts_implementation = EXPERTS
    for block in named.blocks:
        for tensor in block.tensors:
            if tensor.row.buffer:  # kept in float32, as `from_pretrained` keeps them
                owner, _, name = f"{block.prefix}{tensor.name}".rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, name, getattr(module, name).to(getattr(torch, tensor.dtype)))
    return model


def materialise(module: torch.nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers on the meta device by uninitialised ones on `device`; shared ones stay shared."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in made:
                        empty = torch.empty_like(tensor, device=device)
                        made[tensor] = torch.nn.Parameter(empty) if held is part._parameters else empty
                    held[name] = made[tensor]  # type: ignore[assignment]


def compute_rotary_buffers(model: Any, device: torch.device) -> None:
    """Replace the buffers of the rotary embeddings: the config gives their values, the meta device has none."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
