"""Whether the attention that transformers is asked for can be had on this machine."""

from __future__ import annotations

import importlib.util

import torch

from refit.config.scenario import Scenario
from refit.errors import UnavailableError
from refit.models.delta_net_kernels import check_kernels

LIBRARY = "flash_attn"
"""The module behind `flash_attention_2`."""


def check_available(scenario: Scenario, device: torch.device) -> None:
    """Raise UnavailableError where this machine lacks what a side's attention or its delta nets need."""
    check_kernels(scenario, device)
    if not any(side.attn_impl == "flash_attention_2" for side in scenario.sides.values()):
        return
    if device.type != "cuda":
        raise UnavailableError(
            f"--attn-impl flash_attention_2 needs CUDA, the device is {device}: use --attn-impl sdpa"
        )
    if importlib.util.find_spec(LIBRARY) is None:
        raise UnavailableError(
            f"--attn-impl flash_attention_2 needs the module {LIBRARY}, which is not installed: pip install "
            "flash-attn, or use --attn-impl sdpa"
        )
