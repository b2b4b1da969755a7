"""Whether the engine that a scenario asks for can be started on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from refit.config.scenario import Scenario
from refit.errors import UnavailableError
from refit.models.vllm.engine.process import installed_version

TRIED = ("0.32.0",)
"""Versions of vLLM whose load format, post-processing and phases are known."""


def check_available(scenario: Scenario, device: torch.device) -> None:
    """Raise UnavailableError where the side's environment lacks vLLM or has a version that was not tried."""
    options = scenario.destination.vllm
    if options is None or options.engine_python is None:
        return
    if device.type != "cpu":
        raise UnavailableError("--rl-inference-engine-python runs vLLM on CPUs only so far: use gloo or shm")
    found = installed_version(Path(options.engine_python))
    if found.partition("+")[0] not in TRIED:
        raise UnavailableError(
            f"--rl-inference-engine-python has vLLM {found}, tried is {', '.join(TRIED)}: make vllm sets it up"
        )
