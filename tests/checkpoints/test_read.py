from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from refit.checkpoints import read
from refit.checkpoints.files import StoredTensor, read_header
from refit.checkpoints.read import Files, chunks, runs_of
from refit.errors import RefitError
from refit.plan.box import Box


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    ends = [draw(st.integers(offset + 1, size)) for offset, size in zip(offsets, shape, strict=True)]
    return shape, Box(offsets, tuple(end - offset for offset, end in zip(offsets, ends, strict=True)))


@given(boxes())
def test_runs_are_the_elements_of_a_box_in_order(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    numbers = torch.arange(math.prod(shape)).view(shape)[box.slices_within(Box.whole(shape))]
    runs = runs_of(box, shape)
    assert [start + i for start in runs.starts for i in range(runs.length)] == numbers.flatten().tolist()


@given(boxes(), st.integers(1, 40))
def test_chunks_are_the_box_and_none_is_larger_than_the_limit(case: tuple[tuple[int, ...], Box], limit: int) -> None:
    shape, box = case
    counts = torch.zeros(shape)
    for part in chunks(box, limit):
        counts[part.slices_within(Box.whole(shape))] += 1
        assert part.volume <= limit
    assert int(counts[box.slices_within(Box.whole(shape))].sum()) == box.volume == int(counts.sum())


def stored(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    save_file({"before": torch.ones(7), "it": tensor}, folder / "one.safetensors")
    return read_header(folder / "one.safetensors")["it"]


def whole(files: Files, tensor: StoredTensor, box: Box, chunk_bytes: int = read.CHUNK_BYTES) -> torch.Tensor:
    found = torch.full(box.extents, -1.0)
    for part, data in files.read(tensor, tensor.shape, box, chunk_bytes):
        assert data.numel() * data.itemsize <= chunk_bytes
        found[part.slices_within(box)] = data.float()
    return found


@pytest.mark.parametrize("columns", [slice(0, 2048), slice(512, 1024), slice(3, 5), slice(0, 1500)])
@pytest.mark.parametrize("chunk", [1 << 14, 1 << 24])
def test_a_box_has_the_values_that_the_library_reads(tmp_path: Path, columns: slice, chunk: int) -> None:
    tensor = torch.randn(70, 2048).bfloat16()
    box = Box((10, columns.start), (50, columns.stop - columns.start))
    files = Files()
    assert torch.equal(whole(files, stored(tmp_path, tensor), box, chunk), tensor[10:60, columns].float())
    files.close()


def test_a_column_slice_reads_its_own_bytes_and_not_the_tensor(tmp_path: Path) -> None:
    """Each of eight ranks of a TP group, of which every one would map all of the tensor."""
    tensor, files = torch.randn(64, 8192).bfloat16(), Files()
    it = stored(tmp_path, tensor)
    for rank in range(8):
        before = files.read_bytes
        whole(files, it, Box((0, 1024 * rank), (64, 1024)))
        assert files.read_bytes - before == 64 * 1024 * 2 == it.nbytes // 8
    files.close()


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    tensor = stored(tmp_path, torch.ones(100, 100))
    with tensor.path.open("r+b") as file:
        file.truncate(tensor.offset + 1000)
    with pytest.raises(RefitError, match=r"one.safetensors ends at byte \d[\d,]*, it goes on behind it"):
        Files().whole(tensor, tensor.shape, Box.whole(tensor.shape))
