"""The tables of the copy kernel, and the kernel itself in a process of its own."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.copies.batch import CopyBatch
from refit.copies.copy import Copy
from refit.copies.table import TILE_BYTES, Dim, Ints, Runs, build_tables, runs_of, tiles_of
from tests.copies.interpreted import LIMIT_S, run_cases

CASES = Path(__file__).parent / "kernel_cases.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(LIMIT_S)
def test_the_kernel_copies_what_pytorch_copies() -> None:
    run_cases(CASES)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiled_kernel_accesses_sixteen_bytes_at_once(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling needs no GPU; the interpreter takes kernels that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = compiled(capability)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", assembly)) == 8
    assert len(re.findall(r"st\.global\S*\.v4\.b32", assembly)) == 8


def compiled(capability: int) -> str:
    """PTX of the kernel for 16-byte words."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from refit.copies import kernel as copy_kernel

    constants = {"WORD": 16, "ITEM": triton.language.int32, "ITEMS_PER_WORD": 4, "BLOCK": 1024}
    constants |= {"LOAD_EVICTION": "evict_first", "STORE_EVICTION": "", "LOAD_CACHE": "", "STORE_CACHE": ".cs"}
    signature = {"table": "*i64", "num_tiles": "i32", "num_programs": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(copy_kernel._copy_tiles, signature, constants, {(0,): [["tt.divisibility", 16]]})
    assembly: str = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4}).asm["ptx"]
    return assembly


def moved_bytes(table: Ints, word: int) -> dict[int, int]:
    """Destination address -> source address of every byte; no byte is written twice."""
    moves: dict[int, int] = {}
    for source, destination, num_rows, width, source_stride, destination_stride in table.tolist():
        for row, byte in itertools.product(range(num_rows), range(width * word)):
            place = destination + row * destination_stride * word + byte
            assert place not in moves
            moves[place] = source + row * source_stride * word + byte
    return moves


def wanted_bytes(copy: Copy) -> dict[int, int]:
    size = copy.source.element_size()
    places, origins = (
        t.data_ptr() + size * np.array([np.dot(i, t.stride()) for i in np.ndindex(*t.shape)], np.int64)
        for t in (copy.destination, copy.source)
    )
    return {int(p) + b: int(o) + b for p, o in zip(places, origins, strict=True) for b in range(size)}


@st.composite
def views(draw: st.DrawFn) -> Copy:
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 8]), min_size=0, max_size=4))
    pair = []
    for _ in range(2):
        margins = [draw(st.sampled_from([0, 0, 1, 8])) for _ in shape]
        order = draw(st.permutations(range(len(shape))))
        outer = torch.empty([shape[d] + margins[d] for d in order], dtype=dtype)
        inner = outer[tuple(slice(margins[d], None) for d in order)]
        pair.append(inner.permute([order.index(d) for d in range(len(shape))]))
    return Copy(*pair)


@settings(max_examples=100, deadline=None)
@given(views(), st.sampled_from([1, 16, 40, 128, TILE_BYTES]))
def test_tables_move_every_byte_once_and_no_other(copy: Copy, tile_bytes: int) -> None:
    tables = build_tables([copy], tile_bytes)
    assert len(tables) == 1
    ((word, table),) = tables.items()
    assert moved_bytes(table, word) == wanted_bytes(copy)
    assert not (table[:, :2] % word).any()
    assert ((table[:, 2] * table[:, 3] * word) <= max(tile_bytes, word)).all()


def test_dims_contiguous_in_both_are_merged() -> None:
    assert runs_of((4, 1, 6, 8), (48, 7, 8, 1), (48, 3, 8, 1), 2) == Runs((), 384)
    assert runs_of((3, 2048, 1024), (2097152, 1024, 1), (14680064, 7168, 1), 2) == Runs((Dim(6144, 2048, 14336),), 2048)
    assert runs_of((8,), (1,), (0,), 4) == Runs((Dim(8, 4, 0),), 4)
    assert runs_of((), (), (), 4) == Runs((), 4)


def test_short_rows_share_tiles_and_long_ones_are_cut_evenly() -> None:
    column_cut = tiles_of(Runs((Dim(2048, 2048, 14336),), 2048), 16)
    assert column_cut[:, 2:].tolist() == [[64, 128, 896, 128]] * 32
    assert column_cut[1, :2].tolist() == [64 * 14336, 64 * 2048]
    assert tiles_of(Runs((), TILE_BYTES + 128), 16)[:, 3].tolist() == [4104, 4096]
    experts = tiles_of(Runs((Dim(2, 64, 64), Dim(100, 1024, 1024), Dim(3, 1 << 20, 1 << 20)), 16), 16)
    assert experts[:, 2].tolist() == [100] * 6


def test_the_widest_word_that_all_distances_allow() -> None:
    data = torch.empty(4096, dtype=torch.uint8)
    assert data.data_ptr() % 16 == 0
    for offset, word in ((0, 16), (16, 16), (8, 8), (4, 4), (6, 2), (7, 1)):
        assert set(build_tables([Copy(data[2048:2064], data[offset : offset + 16])])) == {word}
    assert set(build_tables([Copy(data[:24], data[2048:2072])])) == {8}
    rows = data.view(64, 64)
    assert set(build_tables([Copy(data[:512].view(32, 16), rows[32:, 4:20])])) == {4}


def test_tables_are_small_beside_what_they_move() -> None:
    whole = torch.empty(20_000_000_016, dtype=torch.uint8, device="meta")
    for size in (TILE_BYTES + 16, 3 * TILE_BYTES, len(whole)):
        ((_, table),) = build_tables([Copy(whole[:size], whole[:size])]).items()
        assert table.nbytes <= size / 1000
        assert (table[:, 3] * 16).sum() == size


def test_equal_layouts_share_tiles_and_keep_their_addresses() -> None:
    data = torch.empty(2, 1000, 16, dtype=torch.uint8)
    pieces = [Copy(d, s) for d, s in zip(data[0], data[1], strict=True)]
    ((_, table),) = build_tables([*pieces, Copy(data[0, :0], data[1, :0])]).items()
    assert table[:, 0].tolist() == [copy.source.data_ptr() for copy in pieces]
    assert table[:, 1].tolist() == [copy.destination.data_ptr() for copy in pieces]


def test_on_cpus_a_batch_needs_no_triton() -> None:
    target = torch.zeros(4)
    CopyBatch([Copy(target, torch.ones(4))], kernel=True).run()
    assert target.tolist() == [1.0] * 4
    code = "import sys, refit.copies.batch; sys.exit('refit.copies.kernel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CASES.parents[2], timeout=150).returncode == 0
