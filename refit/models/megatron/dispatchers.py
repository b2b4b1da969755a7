"""Which token dispatcher a live model has, and whether one can be had here."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from refit.config.scenario import Scenario
from refit.config.steps import Dispatch
from refit.errors import RefitError, UnavailableError
from refit.models.delta_net_kernels import check_kernels
from refit.models.megatron import nccl_ep
from refit.models.megatron.build import BuiltModel

CLASSES = {
    "allgather": "MoEAllGatherTokenDispatcher",
    "alltoall": "MoEAlltoAllTokenDispatcher",
    "flex/deepep": "MoEFlexTokenDispatcher(_DeepepManager)",
    "flex/hybridep": "MoEFlexTokenDispatcher(_HybridEPManager)",
    "flex/ncclep": "MoEFlexTokenDispatcher(_NCCLEPManager)",
}
"""Arm of `Dispatch` -> the class of Megatron-Core's dispatcher, and in brackets of what a flex one sends with."""

LIBRARY = "deep_ep"
"""The module that the backends in NEEDS import (megatron/core/transformer/moe/fused_a2a.py)."""

NEEDS = {"deepep": "Buffer", "hybridep": "HybridEPBuffer"}
"""Backend of flex -> the class of LIBRARY that it uses."""


def check_available(scenario: Scenario, device: torch.device) -> None:
    """Raise UnavailableError where this machine lacks what the scenario's dispatch or its delta nets need."""
    check_kernels(scenario, device)
    if scenario.steps is None or scenario.model is None or scenario.model.experts is None:
        return
    dispatch = scenario.steps.dispatch
    if dispatch.backend is not None:
        _check_library(dispatch.backend, device)
    if dispatch.overlap and device.type != "cuda":
        raise UnavailableError(
            f"--overlap-moe-expert-parallel-comm needs CUDA streams, the device is {device}: leave it out"
        )
    if dispatch.delay_wgrad and scenario.source.transformer_impl != "transformer_engine":
        raise UnavailableError(
            "--delay-wgrad-compute needs the layers of Transformer Engine: use --transformer-impl transformer_engine"
        )


def _check_library(backend: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise UnavailableError(f"--moe-flex-dispatcher-backend {backend} needs CUDA, the device is {device}")
    if backend == "ncclep":
        nccl_ep.check_available()
        return
    if importlib.util.find_spec(LIBRARY) is None:
        raise UnavailableError(
            f"--moe-flex-dispatcher-backend {backend} needs the module {LIBRARY}, which is not installed: install "
            "DeepEP (or UCCL-EP, which brings a module of that name), or use --moe-token-dispatcher-type alltoall"
        )
    if not hasattr(importlib.import_module(LIBRARY), NEEDS[backend]):
        raise UnavailableError(
            f"--moe-flex-dispatcher-backend {backend} needs {LIBRARY}.{NEEDS[backend]}, which the {LIBRARY} installed "
            "here lacks: install one that has it"
        )


def live_dispatcher(built: BuiltModel) -> str | None:
    """The classes of this rank's dispatchers, joined by "+"; None where no layer here has experts."""
    found = {_named(module.token_dispatcher) for chunk in built.chunks for module in _routed(chunk)}
    return "+".join(sorted(found)) or None


def check_live(built: BuiltModel, dispatch: Dispatch) -> None:
    """Raise RefitError unless every dispatcher of the live model is the one asked for."""
    found, expected = live_dispatcher(built), CLASSES[dispatch.arm]
    if found not in (None, expected):
        raise RefitError(
            f"the dispatcher asked for is {dispatch.arm} ({expected}), the live model has {found}: Megatron-Core fell "
            "back, so the run would measure another dispatcher"
        )


def _routed(chunk: torch.nn.Module) -> list[Any]:
    return [module for module in chunk.modules() if hasattr(module, "token_dispatcher")]


def _named(dispatcher: Any) -> str:
    manager = getattr(dispatcher, "_comm_manager", None)
    return type(dispatcher).__name__ + (f"({type(manager).__name__})" if manager is not None else "")
