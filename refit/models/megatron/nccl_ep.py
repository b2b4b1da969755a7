"""NCCL EP, the backend `ncclep` of the flex dispatcher: Megatron-Core 0.19 reaches it through Transformer Engine.

It is set up once per process, with the first micro-batch: for one group of ranks, and for micro-batches of that size.
"""

from __future__ import annotations

import functools
import importlib

import megatron.core
import torch

from refit.errors import UnavailableError

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
        importlib.import_module("transformer_engine.pytorch.ep")
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


def close() -> None:
    """End NCCL EP while its group's communicator exists: at the exit of the process it would use one that is gone."""
    importlib.import_module("megatron.core.transformer.moe.fused_a2a").nccl_ep_finalize()
