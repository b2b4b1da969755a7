"""Two sides with one tensor each, a message between them, and what moves it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from refit.encodings.delta.counts import Counts
from refit.encodings.delta.cpu import CpuDecoder, CpuEncoder
from refit.encodings.delta.form import CPU_BLOCK, max_bytes
from refit.encodings.delta.versions import Versions
from refit.memory.codec import Piece
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from tests.encodings.peers import Board, ThreadPeers

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(data: torch.Tensor) -> torch.Tensor:
    return data.view(BITS[data.element_size()])


def random_values(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> torch.Tensor:
    """All bit patterns, NaN included."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if torch_dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty((), dtype=torch_dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype)


def change(data: torch.Tensor, share: float, generator: torch.Generator) -> int:
    """Change about `share` of the elements, for certain. Returns how many."""
    hit = torch.rand(data.shape, generator=generator) < share
    if data.dtype is torch.bool:
        data.logical_xor_(hit)
    else:
        bits(data).bitwise_xor_(hit.to(bits(data).dtype))
    return int(hit.sum())


def held_in(data: torch.Tensor, tensor: TensorSpec, cuts: tuple[int, ...] = ()) -> LocalWeights:
    """All of a tensor, in `data`, in shards that end at `cuts` of its last dim."""
    whole, last = Box.whole(tensor.shape), len(tensor.shape) - 1
    edges = sorted({0, *cuts, tensor.shape[-1]})
    boxes = [whole.narrow(last, begin, end) for begin, end in itertools.pairwise(edges)]
    # Shards of owners of their own, so that they are not one view.
    shards = []
    for box in boxes:
        part = data[box.slices_within(whole)]
        shards.append(LocalShard(tensor, box, part, part))
    return LocalWeights(shards)


@dataclass
class Pair:
    """One source rank 0, one destination rank 1, and one message of `pieces`."""

    source: LocalWeights
    destination: LocalWeights
    pieces: list[Piece]
    block: int = CPU_BLOCK
    board: Board = field(default_factory=Board)

    def __post_init__(self) -> None:
        self.sent = Versions(ThreadPeers(0, self.board), [1], receives=False)
        self.received = Versions(ThreadPeers(1, self.board), [], receives=True)
        self.counts = Counts()
        self.bind()
        device = self.source.device
        self.payload = torch.zeros(sum(max_bytes(*piece) for piece in self.pieces), dtype=torch.uint8, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)

    def bind(self) -> None:
        """Make `encoder` and `decoder`."""
        self.encoder = CpuEncoder(self.source, self.pieces, self.sent, self.counts, self.block)
        self.decoder = CpuDecoder(self.destination, self.pieces, self.received)

    def begin(self) -> None:
        self.received.begin()
        self.sent.begin()
        self.counts.begin()

    def pack(self) -> int:
        self.encoder.pack(self.payload, self.length)
        return int(self.length)

    def apply(self) -> None:
        self.decoder.unpack(self.payload, self.length)

    def finish(self) -> None:
        self.sent.finish()
        self.received.finish()

    def refit(self) -> int:
        """The bytes that a refit took."""
        self.begin()
        nbytes = self.pack()
        self.apply()
        self.finish()
        return nbytes
