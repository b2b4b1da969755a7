"""Cases of the kernels of deltas, each against the twins on CPUs to the bit: on a GPU, else in Triton's interpreter.

Run by test_kernel in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refit.encodings.delta.elements import UNSIGNED
from refit.encodings.delta.find import unpack_block
from refit.encodings.delta.form import ALIGNMENT, PREAMBLE_BYTES, Form, data_bytes, element_bytes, form_of
from refit.encodings.delta.gpu import GpuDecoder, GpuEncoder, Tuning
from refit.memory.codec import Piece
from refit.memory.weights import LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from tests.encodings.delta.weights import Pair, bits, change, held_in, random_values

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
TUNINGS = [
    Tuning(lanes=64, num_warps=1, apply_lanes=128),
    Tuning(lanes=128, num_warps=2, apply_lanes=32),
]
BOXES = [
    ((32, 128), Box((0, 0), (32, 128))),  # contiguous, words of 16 bytes
    ((32, 256), Box((3, 128), (25, 128))),  # rows at a distance, of such words
    ((30, 133), Box((1, 7), (25, 101))),  # rows of odd lengths
    ((5, 20, 40), Box((1, 3, 0), (3, 10, 40))),  # two dims are rows
    ((5, 20, 40), Box((1, 3, 2), (3, 10, 30))),  # no rows at one distance: gathered
    ((4001,), Box((5,), (3990,))),
]
DTYPES = ["bfloat16", "float8_e4m3fn", "float32", "float64"]
CASES = [(place, dtype) for place in range(len(BOXES)) for dtype in (DTYPES[:1] if place in (3, 5) else DTYPES)]
SHARES = [0.0, 0.01, 0.25, 0.999]


class GpuPair(Pair):
    """The same, by the kernels."""

    def __init__(self, source: LocalWeights, destination: LocalWeights, pieces: list[Piece], tuning: Tuning) -> None:
        self.tuning = tuning
        self.flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        super().__init__(source, destination, pieces, tuning.block)
        self.payload = torch.zeros(1 << 20, dtype=torch.uint8, device=DEVICE)

    def bind(self) -> None:
        self.encoder = GpuEncoder(self.source, self.pieces, self.sent, tuning=self.tuning)
        self.decoder = GpuDecoder(self.destination, self.pieces, self.received, self.flag, tuning=self.tuning)


def blocks_of(message: torch.Tensor, pieces: list[Piece], block: int) -> list[tuple[int, Form, list[int], list[int]]]:
    """Count, form, positions and values of each block, by position: in what order they lie in a message is free."""
    data, found, number = message.cpu().numpy(), [], 0
    table = data[PREAMBLE_BYTES:]
    for tensor, box in pieces:
        size = element_bytes(tensor)
        num = box.volume * tensor.itemsize // size
        for begin in range(0, num, block):
            start, count = table[8 * number : 8 * number + 8].view(np.int32).tolist()
            length = min(block, num - begin)
            form = form_of(count, length, size)
            part = data[start * ALIGNMENT : start * ALIGNMENT + data_bytes(form, count, length, size)]
            if form is Form.WHOLE:
                found.append((count if count < length else length, form, [], part.view(UNSIGNED[size]).tolist()))
            else:
                positions, values = unpack_block(form, count, length, part, UNSIGNED[size])
                order = np.argsort(positions)
                found.append((count, form, positions[order].tolist(), values[order].tolist()))
            number += 1
    return found


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda each: f"{each.lanes}")
@pytest.mark.parametrize(("place", "dtype"), CASES)
def test_messages_and_weights_are_those_of_the_twins(place: int, dtype: str, tuning: Tuning) -> None:
    shape, box = BOXES[place]
    generator = torch.Generator().manual_seed(place)
    tensor = TensorSpec("weight", shape, dtype)
    new, held = (random_values(shape, dtype, generator) for _ in range(2))
    ours = [new.to(DEVICE, copy=True), held.to(DEVICE, copy=True)]
    pieces = [(tensor, box), (tensor, Box(box.offsets, (1,) * len(shape)))]
    twin = Pair(held_in(new, tensor), held_in(held, tensor), pieces, tuning.block)
    twin.payload = torch.zeros(1 << 20, dtype=torch.uint8)
    pair = GpuPair(held_in(ours[0], tensor), held_in(ours[1], tensor), pieces, tuning)
    for share in (1.0, *SHARES):
        change(new, share, generator)
        ours[0].copy_(new)
        assert pair.refit() == twin.refit()
        assert blocks_of(pair.payload, pieces, tuning.block) == blocks_of(twin.payload, pieces, tuning.block)
        assert torch.equal(bits(ours[1]).cpu(), bits(held))
        if pair.sent.reason is None:
            assert int(pair.encoder.counts.sum()) == twin.counts.num_changed
    assert int(pair.flag) == 0


def test_what_is_not_agreed_is_flagged_and_not_applied() -> None:
    shape = (64, 256)
    tensor = TensorSpec("weight", shape, "bfloat16")
    generator = torch.Generator().manual_seed(1)
    new, held = (random_values(shape, "bfloat16", generator).to(DEVICE) for _ in range(2))
    pair = GpuPair(held_in(new, tensor), held_in(held, tensor), [(tensor, Box.whole(shape))], TUNINGS[0])
    pair.refit()
    bits(new)[3:].bitwise_xor_(1)
    pair.begin()
    pair.pack()
    before, good = held.clone(), pair.payload.clone()
    preamble, table = good[:32].view(torch.int64), good[32:].view(torch.int32)
    num_blocks = -(-new.numel() // TUNINGS[0].block)
    for numbers, places, value in (
        (preamble, [0], 9),
        (preamble, [1], 7),
        (preamble, [2], 64),
        (table, [2 * block + 1 for block in range(num_blocks)], 5000),
        (table, [2 * block + 1 for block in range(num_blocks)], -1),
        (table, [2 * block for block in range(num_blocks)], 1 << 20),
    ):
        kept = numbers.clone()
        numbers[places] = value
        pair.payload.copy_(good)
        pair.flag.zero_()
        pair.apply()
        assert int(pair.flag) == 1
        assert torch.equal(bits(held), bits(before))
        numbers.copy_(kept)
    pair.payload.copy_(good)
    pair.apply()
    assert torch.equal(bits(held), bits(new))
