"""NCCL EP, the backend `ncclep` of the flex dispatcher: Megatron-Core 0.19 reaches it through Transformer Engine.

It is set up once per process, with the first micro-batch: for one group of ranks, and for micro-batches of that size.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import megatron.core
import torch

from refit.errors import UnavailableError

MODULE = "transformer_engine.pytorch.ep"
FLAG = "--moe-flex-dispatcher-backend ncclep"


def check_available() -> None:
    """Raise UnavailableError without a Megatron-Core, a Transformer Engine and an NCCL that have it."""
    dispatchers = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if not hasattr(dispatchers, "_NCCLEPManager"):
        raise UnavailableError(
            f"{FLAG} needs Megatron-Core 0.19.2 or newer, {megatron.core.__version__} is installed: upgrade "
            "megatron-core, or use --moe-token-dispatcher-type alltoall"
        )
    try:
        importlib.import_module(MODULE)
        importlib.import_module("transformer_engine").require_nccl_ep()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise UnavailableError(
            f"{FLAG} needs Transformer Engine 2.19 or newer, and the NCCL that it was built with in the whole process "
            f"({error}): pip install 'transformer-engine[pytorch]', and preload it with LD_PRELOAD=.../libnccl.so.2"
        ) from error
    if not _ops_may_leave_out_what_they_write():
        raise UnavailableError(
            f"{FLAG} needs a torch whose custom ops may leave out an argument that they write, in {torch.__version__} "
            "that is an IndexError (torch/_library/custom_ops.py): use torch 2.13"
        )


@functools.cache
def _ops_may_leave_out_what_they_write() -> bool:
    """Whether torch runs such a custom op. Torch 2.11 reads an argument that is not there."""

    def write(written: torch.Tensor, left_out: torch.Tensor | None = None) -> None:
        written.zero_()

    op = torch.library.custom_op("refit::write", write, mutates_args=("written", "left_out"))
    try:
        op(torch.zeros(1))
    except IndexError:
        return False
    return True


@contextlib.contextmanager
def told_of(topk: int | None) -> Iterator[None]:
    """NCCL EP starts for tokens of `topk` experts; with None nothing changes.

    Transformer Engine 2.19 and newer ask for it at the start. Megatron-Core 0.19.2, which was written for 2.18, does
    not pass it on (`ensure_nccl_ep_bootstrapped` in fused_a2a.py).
    """
    if topk is None:
        yield
        return
    library: Any = importlib.import_module(MODULE)
    start = library.ep_bootstrap
    if "num_topk" in inspect.signature(start).parameters:
        start = functools.partial(start, num_topk=topk)
    with patch.object(library, "ep_bootstrap", start):
        yield


def close() -> None:
    """End NCCL EP while its group's communicator exists: at the exit of the process it would use one that is gone."""
    importlib.import_module("megatron.core.transformer.moe.fused_a2a").nccl_ep_finalize()
