"""Finding and packing changes on a CPU beside XOR and zstd: `python -m benchmarks.delta_pack`.

Both get the same BF16 tensors, of which the same share has changed, and what was sent before, on one thread. Both are
timed with the update of that snapshot: at the end it has the new weights. What each packs is unpacked again and
compared as bits. They take turns; times are medians of the CPU time of the thread, which other work on the machine
disturbs least. zstd needs the package zstandard, and is left out without it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from refit.encodings.delta.counts import Counts
from refit.encodings.delta.cpu import CpuDecoder, CpuEncoder
from refit.encodings.delta.form import NO_BASE, max_bytes
from refit.encodings.delta.versions import Versions
from refit.memory.codec import Piece
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

ROWS, COLUMNS = 4096, 2048
LEVEL = 1


class NoPeers:
    """A rank that talks to nobody."""

    rank = 0

    def publish(self, key: str, value: Any) -> None: ...
    def forget(self, key: str) -> None: ...
    def fetch(self, rank: int, key: str) -> Any:
        raise AssertionError(f"rank {rank} does not exist")


@dataclass
class Row:
    """One way: CPU seconds of each round, bytes, and whether all that was unpacked was right."""

    name: str
    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    is_right: bool = True

    def add(self, pack: Callable[[], int], unpack: Callable[[], bool]) -> None:
        since = time.thread_time()
        nbytes = pack()
        self.seconds.append(time.thread_time() - since)
        self.nbytes.append(nbytes)
        self.is_right &= unpack()


class Changes:
    """This suite's encoder of one message."""

    def __init__(self, new: list[torch.Tensor]) -> None:
        self._new = new
        self._held = [torch.zeros_like(each) for each in new]
        pieces: list[Piece] = [
            (TensorSpec(f"t{n}", (ROWS, COLUMNS), "bfloat16"), Box.whole((ROWS, COLUMNS))) for n in range(len(new))
        ]
        self._versions = Versions(NoPeers(), [], receives=False)
        self._encoder = CpuEncoder(_weights(new, pieces), pieces, self._versions, Counts())
        self._decoder = CpuDecoder(_weights(self._held, pieces), pieces, self._versions)
        self._payload = torch.zeros(sum(max_bytes(*piece) for piece in pieces), dtype=torch.uint8)
        self._length = torch.zeros(1, dtype=torch.int64)
        self.pack(is_first=True)
        assert self.unpack()

    def pack(self, *, is_first: bool = False) -> int:
        versions = self._versions
        versions.base = versions.expected = NO_BASE if is_first else versions.version
        versions.version += 1
        self._encoder.pack(self._payload, self._length)
        return int(self._length)

    def unpack(self) -> bool:
        self._decoder.unpack(self._payload, self._length)
        return _equal(self._held, self._new)


class Xored:
    """XOR of old and new through zstd, tensor by tensor."""

    def __init__(self, new: list[torch.Tensor], zstandard: Any) -> None:
        self._new = [_bits(each) for each in new]
        self._old = [each.copy() for each in self._new]
        self._held = [each.copy() for each in self._new]
        self._xor = np.empty_like(self._new[0])
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, threads=0)
        self._decompressor = zstandard.ZstdDecompressor()
        self._packed: list[bytes] = []

    def pack(self) -> int:
        self._packed = []
        for old, new in zip(self._old, self._new, strict=True):
            np.bitwise_xor(old, new, out=self._xor)
            self._packed.append(self._compressor.compress(self._xor.data))
            np.copyto(old, new)
        return sum(map(len, self._packed))

    def unpack(self) -> bool:
        for held, packed in zip(self._held, self._packed, strict=True):
            held ^= np.frombuffer(self._decompressor.decompress(packed), held.dtype).reshape(held.shape)
        return all(np.array_equal(held, new) for held, new in zip(self._held, self._new, strict=True))


def _weights(tensors: list[torch.Tensor], pieces: list[Piece]) -> LocalWeights:
    return LocalWeights(LocalShard(*piece, each, each) for piece, each in zip(pieces, tensors, strict=True))


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def _equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(np.array_equal(_bits(one), _bits(other)) for one, other in zip(found, expected, strict=True))


def change(tensors: list[torch.Tensor], share: float, generator: np.random.Generator) -> None:
    """Change about `share` of the elements to a neighbouring value, up or down, as small optimizer steps do."""
    for tensor in tensors:
        bits = _bits(tensor).reshape(-1)
        places = np.unique(generator.integers(0, bits.size, round(bits.size * share)))
        bits[places] += generator.choice(np.array([1, 0xFFFF], np.uint16), len(places))


def main() -> int:
    """Print a row per way. Returns 1 where anything that was unpacked was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=64, help="of 4,096 x 2,048 (default: 64, 1 GiB)")
    parser.add_argument("--share", type=float, default=0.01, help="of the elements that changes (default: 0.01)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    new = [
        torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(n)).mul_(0.02).bfloat16()
        for n in range(args.tensors)
    ]
    full = sum(each.nbytes for each in new)
    ways: list[tuple[Row, Changes | Xored]] = [(Row("find and pack"), Changes(new))]
    try:
        zstandard = importlib.import_module("zstandard")
        ways.append((Row(f"XOR, zstd -{LEVEL}"), Xored(new, zstandard)))
    except ImportError:
        print("XOR and zstd are left out: pip install zstandard")
    for _ in range(args.rounds):
        change(new, args.share, generator)
        for row, way in ways:
            row.add(way.pack, way.unpack)
    what = f"{full / 2**30:.2f} GiB of BF16, {100 * args.share:g} % changed"
    print(f"{what}, {args.rounds} rounds, one thread, load of the machine {os.getloadavg()[0]:.1f}")
    for row, _ in ways:
        median, part = statistics.median(row.seconds), statistics.mean(row.nbytes) / full
        spread = f"{min(row.seconds):.3f} to {max(row.seconds):.3f}"
        verdict = "right" if row.is_right else "WRONG"
        print(
            f"{row.name:<16} {median:7.3f} s ({spread}), {full / median / 1e9:6.2f} GB/s, {100 * part:.2f} % of the "
            f"bytes, {verdict}"
        )
    if len(ways) > 1:
        (ours, _), (theirs, _) = ways
        times = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
        print(f"{times:.2f} x as fast, {statistics.mean(ours.nbytes) / statistics.mean(theirs.nbytes):.2f} x the bytes")
    return 0 if all(row.is_right for row, _ in ways) else 1


if __name__ == "__main__":
    sys.exit(main())
