"""Whether the engine that a scenario asks for can be started on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from refit.config.registry import ENGINES
from refit.config.scenario import Mode, Scenario
from refit.errors import UnavailableError
from refit.models.vllm.engine.process import installed_version
from refit.predict.vllm.options import VllmOptions

TRIED = {"cpu": ("0.32.0",), "cuda": ("0.25.0",)}
"""By device: versions of vLLM whose load format, post-processing and phases are known."""


def check_available(scenario: Scenario, device: torch.device) -> None:
    """Raise UnavailableError where the side's environment lacks vLLM or has a version that was not tried.

    One rank of a machine asks: of several that find it missing, the first to end would have the speaker killed.
    """
    options = scenario.destination.options_as(VllmOptions)
    if options.engine_python is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    layout = scenario.destination.layout
    if device.type == "cuda" and (scenario.mode is not Mode.COLLOCATED or layout.tp > 1):
        raise UnavailableError(
            f"on GPUs a running vLLM shares its GPU with the one rank that refits it, here are "
            f"{scenario.num_ranks} ranks and TP {layout.tp}: give --refit-mode collocated and TP 1"
        )
    if device.type == "cpu" and options.engine_sleep:
        raise UnavailableError(
            f"vLLM on CPUs does not sleep (--rl-inference-engine-sleep {options.engine_sleep}): leave it out"
        )
    by_cuda = next((name for name in scenario.engines if ENGINES[name].of_cuda), None)
    if device.type == "cpu" and by_cuda is not None:
        raise UnavailableError(f"--refit-engine {by_cuda} updates a running vLLM by CUDA IPC: leave it out on CPUs")
    if device.type == "cpu" and scenario.destination.quantisation is not None:
        raise UnavailableError(
            f"vLLM on CPUs serves no {scenario.destination.quantisation.dtype}: leave --rl-inference-dtype out"
        )
    found = installed_version(Path(options.engine_python))
    if found.partition("+")[0] not in TRIED[device.type]:
        raise UnavailableError(
            f"--rl-inference-engine-python has vLLM {found}, tried is {', '.join(TRIED[device.type])} on "
            f"{device.type}: make vllm sets up that for CPUs"
        )
