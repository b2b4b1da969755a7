"""The speed of thousands of strided copies on GPUs: `python -m benchmarks.copy_speed`.

Every case runs in the copy kernel, in `torch._foreach_copy_`, and, as the yardstick, as one `copy_` of equally many
contiguous bytes. Within GPU 0, bytes count twice, as read and as written. From GPU 0 into GPU 1's memory, where there
is one, they count once. Times are medians of 5 rounds of runs enqueued back to back, so that launches overlap with
copies.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from refit.copies.batch import CopyBatch
from refit.copies.copy import Copy

ROUND_S = 0.02
NUM_ROUNDS = 5
PROGRAMS = (8, 16, 32, 64, 132, 264, 528, 1056)


@dataclass(frozen=True)
class Pair:
    """The devices that a case reads and writes, and how many times a copied byte counts."""

    title: str
    source: torch.device
    target: torch.device
    weight: int


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[Pair], list[Copy]]


def pieces(num_pieces: int, nbytes: int) -> Callable[[Pair], list[Copy]]:
    def build(pair: Pair) -> list[Copy]:
        source, target = filled(pair.source, num_pieces, nbytes // 2), empty(pair.target, num_pieces, nbytes // 2)
        return [Copy(t, s) for t, s in zip(target.unbind(), source.unbind(), strict=True)]

    return build


def column_cuts(num_tensors: int, *, back: bool) -> Callable[[Pair], list[Copy]]:
    """All seven cuts of 2,048 rows x 2 KiB out of each [2048, 7168]; with `back`, into it."""

    def build(pair: Pair) -> list[Copy]:
        whole = (
            empty(pair.target, num_tensors, 2048, 7168) if back else filled(pair.source, num_tensors, 2048, 7168)
        ).unbind()
        cuts = [cut for tensor in whole for cut in tensor.split(1024, 1)]
        packed = filled(pair.source, len(cuts), 2048, 1024) if back else empty(pair.target, len(cuts), 2048, 1024)
        return [Copy(c, p) if back else Copy(p, c) for c, p in zip(cuts, packed.unbind(), strict=True)]

    return build


def mix(pair: Pair) -> list[Copy]:
    """Large and medium pieces, column cuts in both directions, and vectors: 0.4 GB."""
    parts = (pieces(6, 32 << 20), pieces(1024, 64 << 10), column_cuts(2, back=False), column_cuts(2, back=True))
    vectors = (pieces(512, 14336), pieces(64, 1536))
    return [copy for build in (*parts, *vectors) for copy in build(pair)]


CASES = (
    Case("1 x 2 GiB", pieces(1, 2 << 30)),
    Case("1,024 x 512 KiB", pieces(1024, 512 << 10)),
    Case("8,192 x 64 KiB", pieces(8192, 64 << 10)),
    Case("column cuts", column_cuts(18, back=False)),
    Case("column pastes", column_cuts(18, back=True)),
    Case("mix", mix),
)


def filled(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device)


def empty(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int16, device=device)


def median_s(action: Callable[[], object]) -> float:
    """Seconds of one `action`, which enqueues work without waiting."""
    for _ in range(2):
        start = time.perf_counter()
        action()
        synchronize()
        once_s = time.perf_counter() - start
    num_runs = max(1, min(50, int(ROUND_S / once_s)))
    rounds_s = []
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        for _ in range(num_runs):
            action()
        synchronize()
        rounds_s.append((time.perf_counter() - start) / num_runs)
    return statistics.median(rounds_s)


def synchronize() -> None:
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)


def check(copies: list[Copy], name: str) -> None:
    """Check about 200 of the copies. Exits with code 1 where a destination differs from its source."""
    for copy in copies[:: max(1, len(copies) // 200)]:
        if not torch.equal(copy.destination.to(copy.source.device), copy.source):
            sys.exit(f"{name}: the kernel left wrong bytes")


def compare(pair: Pair) -> None:
    print(f"\n# {pair.title}: GB/s")
    print(
        f"{'case':<18}{'copies':>8}{'GB':>7}{'build ms':>10}{'table %':>9}{'kernel':>9}{'foreach':>9}{'one copy_':>11}"
    )
    for case in CASES:
        copies = case.build(pair)
        synchronize()
        start = time.perf_counter()
        batch = CopyBatch(copies)
        build_s = time.perf_counter() - start
        batch.run()
        check(copies, case.name)
        nbytes = batch.nbytes
        plain_source, plain_target = empty(pair.source, nbytes // 2), empty(pair.target, nbytes // 2)
        actions = (batch.run, CopyBatch(copies, kernel=False).run, lambda a=plain_target, b=plain_source: a.copy_(b))
        speeds = [pair.weight * nbytes / median_s(action) / 1e9 for action in actions]
        table_percent = 100 * batch.table_bytes / nbytes
        print(
            f"{case.name:<18}{len(copies):>8}{nbytes / 1e9:>7.2f}{build_s * 1e3:>10.1f}{table_percent:>9.3f}"
            f"{speeds[0]:>9.0f}{speeds[1]:>9.0f}{speeds[2]:>11.0f}",
            flush=True,
        )


def compare_programs(pairs: list[Pair]) -> None:
    """The speed by number of programs, for kernels that must leave room for others."""
    print(f"\n# 8,192 x 64 KiB, by number of programs: GB/s\n{'programs':<18}", end="")
    print("".join(f"{number:>8}" for number in PROGRAMS) + f"{'all':>8}")
    for pair in pairs:
        copies = pieces(8192, 64 << 10)(pair)
        batches = [CopyBatch(copies, num_programs=number) for number in (*PROGRAMS, None)]
        speeds = [pair.weight * batch.nbytes / median_s(batch.run) / 1e9 for batch in batches]
        print(f"{pair.title:<18}" + "".join(f"{speed:>8.0f}" for speed in speeds), flush=True)


def sweep(pairs: list[Pair]) -> None:
    """Compare settings of the kernel, one changed at a time."""
    from refit.copies.kernel import TUNING, KernelCopies

    tunings = [TUNING]
    tunings += [
        replace(TUNING, block_words=w, num_warps=n) for w, n in ((512, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))
    ]
    tunings += [
        replace(TUNING, load_hint=a, store_hint=b)
        for a, b in (("", ""), ("evict_first", ""), (".cg", ".cs"), ("", ".wt"))
    ]
    tunings += [replace(TUNING, tile_bytes=kib << 10) for kib in (32, 64, 256, 512)]
    for pair in pairs:
        copies = [case.build(pair) for case in CASES[2:4]]
        print(f"\n# {pair.title}, settings of the kernel: GB/s of {CASES[2].name} and {CASES[3].name}")
        for tuning in tunings:
            batches = [KernelCopies(some, pair.source, None, tuning) for some in copies]
            sizes = [sum(copy.nbytes for copy in some) for some in copies]
            speeds = [pair.weight * n / median_s(batch.run) / 1e9 for batch, n in zip(batches, sizes, strict=True)]
            print(f"{speeds[0]:>8.0f}{speeds[1]:>8.0f}  {tuning}", flush=True)


def find_pairs() -> list[Pair]:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    pairs = [Pair("within GPU 0", first, first, 2)]
    if torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1):
        # PyTorch opens the peer's memory to GPU 0 with its first copy between the two.
        empty(second, 1).copy_(empty(first, 1))
        pairs.append(Pair("GPU 0 into GPU 1", first, second, 1))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="also compare settings of the kernel")
    wants_sweep = parser.parse_args().sweep
    if not torch.cuda.is_available():
        print("copy_speed: this machine has no CUDA GPU that PyTorch can use", file=sys.stderr)
        sys.exit(3)
    torch.cuda.set_device(0)
    print(f"# {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}")
    pairs = find_pairs()
    for pair in pairs:
        compare(pair)
    compare_programs(pairs)
    if wants_sweep:
        sweep(pairs)


if __name__ == "__main__":
    main()
