"""Why NIXL is slow between two processes' GPU memory: `python -m benchmarks.nixl_vram [--mib 1024] [--two-gpus]`.

For each variant of UCX's settings, two fresh processes, both on GPU 0, or on GPUs 0 and 1 with `--two-gpus`: one writes
into the other's memory by NIXL, in one piece and in 64. Printed are GB/s, the transport that UCX says that it has
chosen, and UCX's first error. The yardstick is a copy into the same memory, opened by CUDA IPC. With `--device cpu` the
same runs in CPU memory, which tests this script.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

VARIANTS: dict[str, dict[str, str]] = {
    "UCX's own choice": {},
    "cuda_ipc and what it needs": {"UCX_TLS": "cuda_ipc,cuda_copy,tcp,self"},
    "no cache of memory types": {"UCX_MEMTYPE_CACHE": "n"},
    "no registration cache": {"UCX_RCACHE_ENABLE": "n", "UCX_CUDA_IPC_CACHE": "n"},
    "whole allocations": {"UCX_CUDA_COPY_REG_WHOLE_ALLOC": "on"},
    "no dmabuf": {"UCX_CUDA_COPY_DMABUF": "no"},
    "expandable segments": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}
TIMEOUT_S = 60.0
NUM_PIECES = 64
REPEATS = 5


def process(rank: int, args: argparse.Namespace, settings: dict[str, str], store: str, pipe: Connection) -> None:
    os.environ.update(settings)
    try:
        pipe.send(_seen(rank, args, store))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _seen(rank: int, args: argparse.Namespace, path: str) -> dict[str, Any]:
    """What rank 0, which writes, has seen; of rank 1 whether the bytes are right."""
    from torch.distributed import FileStore

    from refit.transport.one_sided.nixl.library import agent
    from refit.transport.one_sided.nixl.memory import NixlMemory
    from refit.transport.ranks import Ranks
    from refit.transport.rendezvous import Rendezvous

    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank if args.two_gpus else 0)
        torch.cuda.set_device(device)
    nbytes = args.mib << 20
    data = torch.full((nbytes,), 7 if rank == 0 else 0, dtype=torch.uint8, device=device)
    ranks = Ranks.meet(rank, 2, FileStore(path, 2))
    rendezvous = Rendezvous(ranks, "vram", (0, 1), TIMEOUT_S)
    memory = NixlMemory(rendezvous, agent("UCX"), device, TIMEOUT_S)
    registered = memory.register([data])
    handle = None
    if rank == 1 and device.type == "cuda":
        from torch.multiprocessing.reductions import reduce_tensor

        handle = reduce_tensor(data)
    offer = memory.inbox, memory.offered(registered), data.data_ptr(), registered.regions[0].device, handle
    inbox, metadata, address, theirs_device, handle = memory.exchange(offer, [1 - rank])[1 - rank]
    memory.meet(1 - rank, inbox, metadata)
    if rank == 1:
        _wait(memory, 0)
        is_right = bool((data == 7).all())
        memory.barrier()
        return {"right": is_right}
    found: dict[str, Any] = {}
    for name, number in (("in one piece", 1), (f"in {NUM_PIECES}", NUM_PIECES)):
        found[name] = _written(memory, data, address, registered.regions[0].device, theirs_device, number)
    found["way"] = memory._agent.new_ways()
    found["error"] = memory._agent.said(RuntimeError("none"))
    if handle is not None:
        rebuild, arguments = handle
        opened = rebuild(*arguments)
        found["CUDA IPC"] = nbytes / min(_seconds(lambda: opened.copy_(data)) for _ in range(REPEATS)) / 1e9
        del opened
    memory.raise_counter(1, _credit(), 1)
    memory.barrier()
    return found


def _credit() -> Any:
    from refit.transport.one_sided.peer_memory import Counter

    return Counter.CREDIT


def _wait(memory: Any, peer: int) -> None:
    """Make progress until `peer` has written all."""
    deadline = time.monotonic() + TIMEOUT_S
    while not memory.reached(peer, _credit(), 1):
        assert time.monotonic() < deadline, "the writer has not ended in time"


def _written(memory: Any, data: torch.Tensor, address: int, here: int, there: int, number: int) -> float:
    """GB/s of the fastest of several writes."""
    from refit.copies.batch import CopyBatch
    from refit.transport.one_sided.nixl.memory import NixlPut

    starts = np.arange(number, dtype=np.uint64) * (data.numel() // number)
    rows = [
        np.stack(
            [starts + np.uint64(first), np.full_like(starts, data.numel() // number), np.full_like(starts, device)], 1
        )
        for first, device in ((data.data_ptr(), here), (address, there))
    ]
    write = memory.write(memory.listed(None, rows[0]), memory.listed(1, rows[1]), np.arange(number, dtype=np.int32))

    def run() -> None:
        memory.send(1, NixlPut(CopyBatch(()), write=write), 1)
        memory.finish()

    return data.numel() / min(_seconds(run) for _ in range(REPEATS)) / 1e9


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(args: argparse.Namespace, settings: dict[str, str]) -> list[Any]:
    """What both processes answer under these settings."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(2)]
        processes = [
            context.Process(target=process, args=(rank, args, settings, f"{folder}/store", pipes[rank][1]), daemon=True)
            for rank in range(2)
        ]
        for each in processes:
            each.start()
        answers = [pipe.recv() if pipe.poll(3 * TIMEOUT_S) else "no answer" for pipe, _ in pipes]
        for each in processes:
            each.kill()
            each.join()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mib", type=int, default=1024, help="what is written, in MiB; default: 1024")
    parser.add_argument("--two-gpus", action="store_true", help="a GPU for each process")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU: --device cpu tests the script")
    for name, settings in VARIANTS.items():
        answers = measured(args, settings)
        print(f"{name} ({' '.join(f'{key}={value}' for key, value in settings.items()) or 'nothing set'})")
        for rank, found in enumerate(answers):
            lines = found.items() if isinstance(found, dict) else [("failed", found)]
            for key, value in lines:
                print(f"  rank {rank} {key}: {f'{value:.2f} GB/s' if isinstance(value, float) else value}", flush=True)


if __name__ == "__main__":
    main()
