"""Whether the GPUs of this host can open each other's memory by CUDA IPC."""

from __future__ import annotations

import os

import torch

from refit.errors import UnavailableError
from refit.transport.ranks import gpus_here


def check_available(ranks_per_gpu: int = 1) -> None:
    """Raises UnavailableError with what stands in the way. Needs no process group. Ranks may share a GPU.

    That all ranks are on one host, and in one container, is known from torchrun's variables: one agent starts them.
    """
    if not torch.cuda.is_available():
        raise UnavailableError("cuda-ipc needs CUDA GPUs, this machine has none: use --refit-method shm or gloo")
    gpus, num_gpus = gpus_here(ranks_per_gpu), torch.cuda.device_count()
    num_ranks, here = gpus.ranks_per_host, gpus.device_of(int(os.environ.get("LOCAL_RANK", "0")))
    if gpus.gpus_per_host > num_gpus:
        raise UnavailableError(
            f"cuda-ipc needs every rank to see the GPUs of all ranks, this one sees {num_gpus} for {num_ranks} ranks: "
            "leave CUDA_VISIBLE_DEVICES the same for all (Slurm: no --gpus-per-task), or use --refit-method nccl"
        )
    name = torch.cuda.get_device_name(here)
    if num_ranks > 1 and "MIG" in name:
        raise UnavailableError(f"cuda-ipc cannot open memory of a MIG instance ({name}): use --refit-method gloo")
    for peer in range(gpus.gpus_per_host):
        if peer != here and not torch.cuda.can_device_access_peer(here, peer):
            raise UnavailableError(
                f"cuda-ipc needs peer access between all GPUs, GPU {here} has none to GPU {peer}: "
                "use --refit-method nccl"
            )
