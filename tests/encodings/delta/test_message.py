"""A message of changes: what is packed and applied equals the new weights, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refit.encodings.delta.find import take_changes
from refit.encodings.delta.form import (
    CPU_BLOCK,
    LEAST_BLOCK,
    PREAMBLE_BYTES,
    Form,
    data_bytes,
    expected_bytes,
    form_of,
    max_bytes,
    num_blocks,
)
from refit.errors import RefitError
from refit.plan.box import Box
from refit.plan.sharding import ITEMSIZE, TensorSpec
from tests.encodings.delta.weights import Pair, bits, change, held_in, random_values

DTYPES = sorted(ITEMSIZE)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape of up to three dims, and a box in it."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    extents = tuple(draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return shape, Box(offsets, extents)


@given(
    boxes(),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=4),
    st.lists(st.integers(1, 39), max_size=2),
    st.sampled_from([16, 48, 1024, CPU_BLOCK]),
    st.integers(0, 2**31),
)
def test_changes_make_the_new_weights(
    place: tuple[tuple[int, ...], Box], dtype: str, shares: list[float], cuts: list[int], block: int, seed: int
) -> None:
    """Of any dtype, shape, box, share, strides, in one view or several, with blocks of any size."""
    shape, box = place
    generator = torch.Generator().manual_seed(seed)
    tensor = TensorSpec("weight", shape, dtype)
    new = random_values(shape, dtype, generator)
    held = random_values(shape, dtype, generator)
    outside = held.clone()
    cut = tuple(each for each in cuts if each < shape[-1])
    pair = Pair(held_in(new, tensor, cut[:1]), held_in(held, tensor, cut[1:]), [(tensor, box)], block)
    pair.payload = torch.zeros(1 << 20, dtype=torch.uint8)  # blocks that no run has are shorter than any bound
    where = box.slices_within(Box.whole(shape))
    for number, share in enumerate([1.0, *shares]):
        num_changed = change(new[where], share, generator)
        nbytes = pair.refit()
        assert block < LEAST_BLOCK or nbytes <= max_bytes(tensor, box)
        assert torch.equal(bits(held[where]), bits(new[where]))
        if number:
            assert pair.sent.reason is None
            per_element = 2 if ITEMSIZE[dtype] == 8 else 1
            assert num_changed <= pair.counts.num_changed <= num_changed * per_element
            assert pair.counts.num_compared == box.volume * per_element
    before = held.clone()
    pair.decoder._versions.expected = pair.sent.base  # the same message again
    pair.apply()
    assert torch.equal(bits(before), bits(held)), "replay changes nothing"
    held[where] = outside[where]
    assert torch.equal(bits(held), bits(outside)), "nothing beside the box was written"


def whole_pair(shape: tuple[int, ...] = (300, 700), share: float = 0.01) -> tuple[Pair, torch.Tensor, torch.Tensor]:
    """A pair after its full refit, with changes to send, the new weights and those held."""
    generator = torch.Generator().manual_seed(1)
    tensor = TensorSpec("weight", shape, "bfloat16")
    new, held = (random_values(shape, "bfloat16", generator) for _ in range(2))
    pair = Pair(held_in(new, tensor), held_in(held, tensor), [(tensor, Box.whole(shape))])
    pair.refit()
    change(new, share, generator)
    return pair, new, held


@pytest.mark.parametrize(
    ("share", "form", "part"),
    [(0.01, Form.POSITIONS, 0.0201), (0.05, Form.POSITIONS, 0.101), (0.2, Form.MASK, 0.264), (0.99, Form.WHOLE, 1.001)],
)
def test_the_shortest_form_is_taken(share: float, form: Form, part: float) -> None:
    pair, new, held = whole_pair((1024, 1024), share=share)
    nbytes = pair.refit()
    assert torch.equal(bits(new), bits(held))
    assert nbytes / (2 * 1024 * 1024) == pytest.approx(part, rel=0.02)
    assert nbytes == pytest.approx(expected_bytes(1024 * 1024, 2, share), rel=0.02)
    assert form_of(round(65536 * share), 65536, 2) is form


def test_forms_of_all_counts() -> None:
    """No block takes more than whole, and none in a longer form than another."""
    for size in (1, 2, 4):
        for num in (1, 31, 32, 1000, 65536):
            for count in {0, 1, num // 100, num // 17, num // 16, num // 15, num // 2, num - 1, num}:
                least = min(data_bytes(form, count, num, size) for form in Form)
                assert data_bytes(form_of(count, num, size), count, num, size) == least <= num * size


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("num", [0, 1, 15, 31, 32, 33, 1000, 1 << 17])
def test_all_that_differs_is_found_in_order(dtype: type, num: int, length: int) -> None:
    """Whichever way it is looked for, few changes or many, single ones or runs of `length`."""
    generator = np.random.default_rng(num)
    new = generator.integers(0, 256, num).astype(dtype)
    for share in (0.0, 0.001, 0.03, 0.09, 0.11, 0.6, 1.0):
        old, is_changed = new.copy(), np.repeat(generator.random(num) < share, length)[:num]
        old[is_changed] ^= 1
        expected = np.flatnonzero(old != new)
        positions, values = take_changes(old, new)
        assert positions.tolist() == expected.tolist()
        assert values.tolist() == new[expected].tolist()
        assert np.array_equal(old, new)


def test_bounds_do_not_grow_where_boxes_shrink() -> None:
    for dtype in DTYPES:
        bounds = [max_bytes(TensorSpec("a", (n,), dtype), Box((0,), (n,))) for n in range(1, 20_000, 7)]
        assert bounds == sorted(bounds)
    assert num_blocks(8193, 8192) == 2


def test_messages_that_are_none_are_refused() -> None:
    """Before the weights of their piece are touched."""
    pair, _, held = whole_pair()
    pair.begin()
    end = pair.pack()
    before, good = held.clone(), pair.payload.clone()
    header, table = good[:PREAMBLE_BYTES].view(torch.int64), good[PREAMBLE_BYTES:].view(torch.int32)
    wrong = {
        "leads to version 9, this refit to 2": (header, 0, 9),
        "changes are to version 7, these weights have version 1": (header, 1, 7),
        "blocks have 0 elements": (header, 2, 0),
        "a block of 65536 elements has 70000 changes": (table, 1, 70000),
        "and is cut off": (table, 0, 1 << 20),
    }
    for text, (numbers, place, value) in wrong.items():
        kept = int(numbers[place])
        numbers[place] = value
        pair.payload.copy_(good)
        with pytest.raises(RefitError, match=text):
            pair.apply()
        numbers[place] = kept
        assert torch.equal(bits(before), bits(held))
    pair.payload.copy_(good)
    pair.length.fill_(16)
    with pytest.raises(RefitError, match="it has 16 bytes"):
        pair.apply()
    pair.length.fill_(end)
    pair.apply()


def test_a_source_in_another_dtype_is_cast() -> None:
    spec = TensorSpec("weight", (64, 64), "bfloat16")
    new, held = torch.randn(64, 64), torch.zeros(64, 64, dtype=torch.bfloat16)
    pair = Pair(held_in(new, spec), held_in(held, spec), [(spec, Box((3, 5), (40, 50)))])
    for _ in range(3):
        pair.refit()
        assert torch.equal(held[3:43, 5:55], new[3:43, 5:55].bfloat16())
        new[10, 10] += 1.0
