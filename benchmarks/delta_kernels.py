"""The speed of the kernels of deltas on a GPU: `python -m benchmarks.delta_kernels`.

A snapshot and new weights differ in a share of their BF16 elements, at random places or in random rows. In one run:
`copy_` of the weights, two single-pass kernels that find and pack as a first attempt would (a prefix sum over all
elements of a program, and over groups of four; neither writes the snapshot), and this suite's, which does, with several
tunings. Rates count the bytes of both versions as read, whatever else is read and written. After each run the snapshot
must equal the weights, and a third copy after it has applied the message, to the bit. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from refit.encodings.delta.form import expected_bytes, table_end
from refit.encodings.delta.gpu import TUNING, GpuDecoder, GpuEncoder, Tuning
from refit.encodings.delta.versions import Versions
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

COLUMNS = 4096
TUNINGS = (
    TUNING,
    Tuning(lanes=256, num_warps=4),
    Tuning(lanes=256, num_warps=8),
    Tuning(lanes=512, num_warps=4),
    Tuning(lanes=512, num_warps=8),
)
APPLY = ((128, 4), (256, 4), (256, 8), (512, 4))


@triton.jit
def _flip(new, num, seed, threshold, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Change the lowest bit of elements by chance: of those with equal numbers >> SHIFT, all or none."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    drawn = tl.randint(seed, (place >> SHIFT).to(tl.int32)) & 0x7FFFFFFF
    hit = (place < num) & (drawn < threshold)
    values = tl.load(new + place, mask=hit, other=0)
    tl.store(new + place, values ^ 1, mask=hit)


@triton.jit
def _first_kernel(old, new, pos, val, base, count, total, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program compares BLOCK elements, one in each lane at a time, with a prefix sum over all."""
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    idx = pid * BLOCK + lane
    m = idx < n
    a = tl.load(old + idx, mask=m, other=0)
    b = tl.load(new + idx, mask=m, other=0)
    ch = (a != b) & m
    c = ch.to(tl.int32)
    k = tl.sum(c, 0)
    tl.store(count + pid, k)
    if k > 0:
        start = tl.atomic_add(total, k.to(tl.int64))
        tl.store(base + pid, start)
        rank = tl.cumsum(c, 0) - 1
        tl.store(pos + start + rank, lane.to(tl.int16), mask=ch)
        tl.store(val + start + rank, b, mask=ch)


@triton.jit
def _second_kernel(old, new, pos, val, base, count, total, n, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four elements to a lane, a prefix sum over lanes, four pairs of stores. `old` and `new` are words of 8 bytes."""
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    idx = pid * LANES + lane
    m = idx < n
    a = tl.load(old + idx, mask=m, other=0)
    b = tl.load(new + idx, mask=m, other=0)
    x = a ^ b
    f0 = ((x & 0xFFFF) != 0).to(tl.int32)
    f1 = (((x >> 16) & 0xFFFF) != 0).to(tl.int32)
    f2 = (((x >> 32) & 0xFFFF) != 0).to(tl.int32)
    f3 = (((x >> 48) & 0xFFFF) != 0).to(tl.int32)
    c = f0 + f1 + f2 + f3
    k = tl.sum(c, 0)
    tl.store(count + pid, k)
    if k > 0:
        start = tl.atomic_add(total, k.to(tl.int64), sem="relaxed")
        tl.store(base + pid, start)
        r = start + tl.cumsum(c, 0) - c
        tl.store(pos + r, (lane * 4).to(tl.int16), mask=f0 > 0)
        tl.store(val + r, (b & 0xFFFF).to(tl.int16), mask=f0 > 0)
        r += f0
        tl.store(pos + r, (lane * 4 + 1).to(tl.int16), mask=f1 > 0)
        tl.store(val + r, ((b >> 16) & 0xFFFF).to(tl.int16), mask=f1 > 0)
        r += f1
        tl.store(pos + r, (lane * 4 + 2).to(tl.int16), mask=f2 > 0)
        tl.store(val + r, ((b >> 32) & 0xFFFF).to(tl.int16), mask=f2 > 0)
        r += f2
        tl.store(pos + r, (lane * 4 + 3).to(tl.int16), mask=f3 > 0)
        tl.store(val + r, ((b >> 48) & 0xFFFF).to(tl.int16), mask=f3 > 0)


class Alone:
    """A rank without peers."""

    rank = 0

    def publish(self, key: str, value: Any) -> None: ...
    def forget(self, key: str) -> None: ...
    def fetch(self, rank: int, key: str) -> Any:
        raise AssertionError("nobody publishes")


def median_s(run: Callable[[], object], num_rounds: int, before: Callable[[int], object] = lambda _: None) -> float:
    """The median time of `run` on the current stream, in seconds, each after `before` and after one to warm up."""
    seconds = []
    for number in range(1 + num_rounds):
        before(number)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run()
        ended.record()
        ended.synchronize()
        if number:
            seconds.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(seconds)


@dataclass
class Bench:
    """Three versions of the same weights: the snapshot `old`, `new`, and `held`, what a destination has."""

    old: torch.Tensor
    new: torch.Tensor
    held: torch.Tensor
    rounds: int
    seed: int = 0
    wrong: int = 0

    def change(self, share: float, shift: int = 0) -> None:
        self.seed += 1
        num, block = self.new.numel(), 8192
        threshold = min(2**31 - 1, round(share * 2**31))
        _flip[(triton.cdiv(num, block),)](self.new.view(-1), num, self.seed, threshold, SHIFT=shift, BLOCK=block)

    def is_equal(self, other: torch.Tensor) -> bool:
        same = all(torch.equal(a, b) for a, b in zip(other.split(1 << 15), self.new.split(1 << 15), strict=True))
        self.wrong += not same
        return same

    def rate(self, seconds: float) -> str:
        return f"{2 * self.new.nbytes / seconds / 1e12:6.2f} {seconds * 1e3:8.3f}"

    def weights(self, data: torch.Tensor) -> LocalWeights:
        tensor = TensorSpec("weights", tuple(data.shape), "int16")
        return LocalWeights([LocalShard(tensor, Box.whole(tensor.shape), data, data)])


def references(bench: Bench, share: float) -> None:
    old, new = bench.old.view(-1), bench.new.view(-1)
    num = new.numel()
    room = int(num * share * 1.05) + (1 << 16)
    positions, values = (torch.empty(room, dtype=torch.int16, device="cuda") for _ in range(2))
    total = torch.zeros(1, dtype=torch.int64, device="cuda")
    words = (old.view(torch.int64), new.view(torch.int64))
    for name, kernel, parts, length, sizes, warps in (
        ("first kernel, 8,192", _first_kernel, (old, new), num, {"BLOCK": 8192}, 8),
        ("second kernel, 512 lanes", _second_kernel, words, num // 4, {"LANES": 512}, 4),
        ("second kernel, 1,024 lanes", _second_kernel, words, num // 4, {"LANES": 1024}, 4),
    ):
        programs = triton.cdiv(length, next(iter(sizes.values())))
        base = torch.zeros(programs, dtype=torch.int64, device="cuda")
        count = torch.zeros(programs, dtype=torch.int32, device="cuda")

        def run() -> None:
            total.zero_()
            kernel[(programs,)](*parts, positions, values, base, count, total, length, **sizes, num_warps=warps)  # noqa: B023

        print(f"  {name:34} {bench.rate(median_s(run, bench.rounds))}", flush=True)


def ours(bench: Bench, share: float, shift: int, tunings: Sequence[Tuning]) -> None:
    num = bench.new.numel()
    versions = Versions(Alone(), [], receives=False)
    for tuning in tunings:
        source, destination = bench.weights(bench.new), bench.weights(bench.held)
        pieces = [(next(iter(source)).tensor, Box.whole(tuple(bench.new.shape)))]
        encoder = GpuEncoder(source, pieces, versions, tuning=tuning)
        most = table_end(len(encoder.counts)) + int(1.2 * expected_bytes(num, 2, share, tuning.block)) + (64 << 20)
        payload = torch.empty(most if share < 0.2 else 2 * num + most, dtype=torch.uint8, device="cuda")
        length = torch.zeros(1, dtype=torch.int64, device="cuda")
        encoder.snapshot.view(torch.int16).view(bench.new.shape).copy_(bench.new)
        bench.held.copy_(bench.new)
        versions.version = versions.base = versions.expected = 1

        def before(number: int) -> None:
            bench.change(share, shift)

        seconds = median_s(partial(encoder.pack, payload, length), bench.rounds, before)
        right = bench.is_equal(encoder.snapshot.view(torch.int16).view(bench.new.shape))
        part, found = int(length) / bench.new.nbytes, int(encoder.counts.sum()) / num
        name = f"{tuning.lanes} lanes, {tuning.num_warps} warps"
        print(f"  {name:34} {bench.rate(seconds)}  {100 * found:.3f} % changed, {100 * part:.3f} % of the bytes, "
              f"{'right' if right else 'WRONG'}", flush=True)  # fmt: skip
        bench.held.copy_(bench.new)
        bench.change(share, shift)
        encoder.pack(payload, length)
        for lanes, warps in APPLY if tuning is tunings[0] else ():
            flag = torch.zeros(1, dtype=torch.int32, device="cuda")
            tuned = replace(tuning, apply_lanes=lanes, apply_warps=warps)
            decoder = GpuDecoder(destination, pieces, versions, flag, tuning=tuned)
            decoder.unpack(payload, length)
            right = bench.is_equal(bench.held) and int(flag) == 0
            # Each time all that is to be written differs from what is there.
            flip = lambda _: bench.held.bitwise_xor_(1)  # noqa: E731
            seconds = median_s(partial(decoder.unpack, payload, length), bench.rounds, flip)
            bench.held.copy_(bench.new)
            print(f"    apply, {lanes} lanes, {warps} warps {seconds * 1e3:25.3f} ms, {'right' if right else 'WRONG'}",
                  flush=True)  # fmt: skip
        del encoder, payload, before


def main() -> int:
    """Print a table per share. Returns 1 where weights are wrong, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=29.0, help="weights in GB, three times in memory (default: 29)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--shares", default="0.001,0.01,0.05", help="shares that change (default: 0.001,0.01,0.05)")
    parser.add_argument("--best", action="store_true", help="the tuning in use alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("delta_kernels: this machine has no CUDA GPU that PyTorch can use", file=sys.stderr)
        return 3
    rows = int(args.gb * 1e9 / 2 / COLUMNS)
    new = torch.randint(-30000, 30000, (rows, COLUMNS), dtype=torch.int16, device="cuda")
    bench = Bench(torch.empty_like(new), new, torch.empty_like(new), args.rounds)
    print(f"{torch.cuda.get_device_name()}, {new.nbytes / 1e9:.2f} GB of weights, median of {args.rounds}")
    print(f"  {'':34} {'TB/s':>6} {'ms':>8}   old + new read")
    print(f"  {'copy_ (read + written)':34} {bench.rate(median_s(lambda: bench.old.copy_(new), args.rounds))}")
    tunings = TUNINGS[:1] if args.best else TUNINGS
    for share in (float(text) for text in args.shares.split(",")):
        print(f"{100 * share:g} % changed, uniformly")
        bench.old.copy_(new)
        bench.change(share)
        references(bench, share)
        bench.old = torch.empty(0, dtype=torch.int16, device="cuda")  # make room for the encoder's snapshot
        ours(bench, share, 0, tunings)
        bench.old = torch.empty_like(new)
    print("1 % changed, whole rows")
    bench.old = torch.empty(0, dtype=torch.int16, device="cuda")
    ours(bench, 0.01, 12, tunings[:1])
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
