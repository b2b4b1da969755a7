"""The speed of bare NCCL with the message sizes and patterns of a refit: consecutive groups of sends and receives.

    torchrun --nproc-per-node 4 -m benchmarks.nccl_rounds
    NCCL_P2P_NVL_CHUNKSIZE=65536 torchrun --nproc-per-node 4 -m benchmarks.nccl_rounds

GB/s are the bytes that the busiest rank sends, over the slowest rank's time. Needs four ranks. Without GPUs it runs
over Gloo with small messages, as a test of the script.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

Pattern = dict[int, dict[int, int]]
"""Sender -> receiver -> MiB per round."""

ROUND_MIB = 2560
"""MiB that the busiest rank sends per measurement, in at least ten rounds."""


def patterns() -> dict[str, Pattern]:
    found: dict[str, Pattern] = {}
    for mib in (32, 64, 128, 256, 512):
        found[f"one message of {mib} MiB, 0 -> 2, 1 -> 3"] = {0: {2: mib}, 1: {3: mib}}
    for mib in (64, 128, 256):
        found[f"{mib} MiB each way between 0 and 2, 1 and 3"] = {0: {2: mib}, 1: {3: mib}, 2: {0: mib}, 3: {1: mib}}
    found["64 MiB to each of two peers"] = {0: {2: 64, 3: 64}, 1: {2: 64, 3: 64}}
    found["96 and 32 MiB to two peers"] = {0: {2: 96, 3: 32}, 1: {3: 96, 2: 32}}
    found["32 MiB from each to each"] = {rank: {peer: 32 for peer in range(4) if peer != rank} for rank in range(4)}
    return found


def seconds(pattern: Pattern, unit: int, device: torch.device, num_rounds: int) -> float:
    """Median of five measurements of `num_rounds` rounds, of the slowest rank."""
    rank = dist.get_rank()
    sends = {peer: torch.empty(n * unit, dtype=torch.uint8, device=device) for peer, n in pattern.get(rank, {}).items()}
    origins = {sender: targets[rank] for sender, targets in pattern.items() if rank in targets}
    receives = {peer: torch.empty(n * unit, dtype=torch.uint8, device=device) for peer, n in origins.items()}
    samples = []
    for measurement in range(6):
        synchronise(device)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(num_rounds if measurement else 3):
            operations = [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in receives.items()]
            operations += [dist.P2POp(dist.isend, buffer, peer) for peer, buffer in sends.items()]
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        synchronise(device)
        samples.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(samples[1:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    unit = 1 << 20 if cuda else 1 << 10
    for name, pattern in patterns().items():
        sent = max(sum(targets.values()) for targets in pattern.values())
        num_rounds = max(10, ROUND_MIB // sent) if cuda else 2
        rate = sent * unit * num_rounds / seconds(pattern, unit, device, num_rounds) / 1e9
        if dist.get_rank() == 0:
            print(f"{name:<48}{rate:8.1f} GB/s{'' if cuda else '  (Gloo, KiB for MiB)'}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
