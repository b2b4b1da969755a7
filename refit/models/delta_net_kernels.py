"""Whether the kernels of gated delta nets can be had on this machine, where their time is measured."""

from __future__ import annotations

import importlib.util

import torch

from refit.config.scenario import Scenario
from refit.errors import UnavailableError

LIBRARY = "fla"
"""The module of flash-linear-attention, whose kernels run on GPUs only."""


def has_kernels() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


def check_kernels(scenario: Scenario, device: torch.device) -> None:
    """Raise UnavailableError where steps on a GPU would time the torch versions that libraries fall back to."""
    model = scenario.model
    if scenario.steps is None or model is None or model.delta_net is None or device.type != "cuda" or has_kernels():
        return
    raise UnavailableError(
        f"steps of gated delta nets on GPUs need the module {LIBRARY}, which is not installed: pip install "
        "flash-linear-attention, or measure the refit alone"
    )
