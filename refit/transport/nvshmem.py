"""NVSHMEM as a substrate of the one-sided executor: not in this version; asking for it says what to use instead."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from refit.errors import UnavailableError
from refit.plan.plan import RefitPlan
from refit.transport.base import Program, TransportOptions
from refit.transport.memory import WeightMemory


class NvshmemTransport:
    """Known by name, so that asking for it is answered with the reason and not with an unknown flag."""

    name = "nvshmem"

    def check_available(self) -> None:
        if not torch.cuda.is_available():
            raise UnavailableError("nvshmem needs CUDA GPUs, this machine has none: use --refit-method shm or gloo")
        if find_spec("nvshmem") is None:
            raise UnavailableError(
                "nvshmem needs nvshmem4py, which is not installed: pip install 'refit-benchmark[nvshmem]', "
                "or use --refit-method nccl"
            )
        raise UnavailableError("nvshmem is not in this version yet: use --refit-method nccl")

    def prepare(
        self, plan: RefitPlan, source: WeightMemory | None, destination: WeightMemory | None, options: TransportOptions
    ) -> Program:
        """Always raises UnavailableError."""
        self.check_available()
        raise AssertionError("check_available raises")
