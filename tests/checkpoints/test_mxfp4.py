"""MXFP4 as gpt-oss has it, read by both readers and by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from refit.bench.file_values import FileValues
from refit.checkpoints.contents import Contents, Form, mxfp4_weights, pieces_in
from refit.checkpoints.files import read_folder
from refit.checkpoints.read import Files, read_piece
from refit.errors import UsageError
from refit.memory.rows import row_numbers, rows_of
from refit.memory.weights import new_shard
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.predict.families.names import NamedTensor, Piece
from refit.predict.families.tables import Row
from tests.checkpoints.made import in_one_file

EXPERTS, INPUTS, ROWS = 3, 96, 10
NAME, KEY = "mlp.experts.down_proj", "it"
SHAPE = (EXPERTS, INPUTS, ROWS)
"""Of the weights in memory: transposed, where the files have `[experts, rows, inputs]`."""


def tensor() -> NamedTensor:
    whole = Box.whole(SHAPE)
    return NamedTensor(NAME, SHAPE, "bfloat16", Row(NAME, KEY, routed=True), (Piece(whole, KEY, whole),))


def folder(path: Path, **changed: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (EXPERTS, ROWS, INPUTS // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (EXPERTS, ROWS, INPUTS // 32), generator=generator, dtype=torch.uint8)
    return in_one_file(path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, **changed})


def contents(path: Path) -> Contents:
    stored = read_folder(path)
    weights = mxfp4_weights(stored, NAME, tensor())
    assert weights.form is Form.MXFP4
    return Contents(stored, {KEY: [piece for _, piece in pieces_in(tensor(), weights)]}, ())


@pytest.mark.parametrize("box", [Box.whole(SHAPE), Box((1, 7, 2), (2, 70, 5)), Box((0, 33, 9), (1, 1, 1))])
def test_both_readers_find_what_transformers_makes_of_it(tmp_path: Path, box: Box) -> None:
    found = contents(folder(tmp_path / "it"))
    stored = {name: FileValues(found)._named(each) for name, each in found.folder.tensors.items()}
    expected = convert_moe_packed_tensors(stored[f"{NAME}_blocks"], stored[f"{NAME}_scales"], dtype=torch.float32)
    assert expected.shape == SHAPE
    (piece,) = found.pieces_of(KEY, box)
    loaded = torch.full(box.extents, float("nan"))
    for part, values in read_piece(Files(), piece):
        loaded[part.slices_within(box)] = values
    assert torch.equal(loaded, expected[box.slices_within(Box.whole(SHAPE))])
    spec = TensorSpec(KEY, SHAPE, "float32", stacked=True)
    for block in rows_of(new_shard(spec, box, torch.device("cpu"))):
        assert torch.equal(block.row_numbers, row_numbers(SHAPE, box, block.row_numbers.device))
        again = FileValues(found).values(spec, block, 0)
        assert torch.equal(again, loaded.view(again.shape))


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("_scales", torch.ones(EXPERTS, ROWS, 2, dtype=torch.uint8), r"MXFP4 of \[3, 10, 96\] is \[3, 10, 3, 16\]"),
        ("_scales", torch.ones(EXPERTS, ROWS, 3), "down_proj_scales is F32 in .*, codes and scales of MXFP4 are U8"),
    ],
)
def test_codes_of_another_shape_or_dtype_are_named(tmp_path: Path, name: str, changed: torch.Tensor, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        contents(folder(tmp_path / "it", **{NAME + name: changed}))
