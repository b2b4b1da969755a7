"""Fills the weights of a side on this rank from the files of a folder."""

from __future__ import annotations

import torch

from refit.checkpoints.contents import Contents
from refit.checkpoints.read import Files, read_piece
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights


def load(weights: LocalWeights, contents: Contents, *, shared: bool = False) -> int:
    """Fill every box that this rank holds; rows of padding are zero. Returns the bytes that were read.

    `shared`: other ranks of this host read the rest of what is cut into columns.

    Values are rounded to the dtype of the weights. A box that this rank holds twice, as tied embeddings are on one
    rank, is one view. Raises RefitError where a file cannot be read.
    """
    files = Files(shared)
    try:
        with torch.no_grad():
            for shard in weights:
                left = shard.box.volume
                for piece in contents.pieces_of(shard.tensor.key, shard.box):
                    for box, values in read_piece(files, piece):
                        part_within(shard.view.detach(), shard.box, box).copy_(values)
                        left -= box.volume
                if left:
                    _zero_padding(shard.view.detach(), shard.box.offsets[0], contents.num_rows(shard.tensor.key))
    finally:
        files.close()
    return files.read_bytes


def _zero_padding(view: torch.Tensor, first: int, num_rows: int) -> None:
    """Zero what lies behind row `num_rows` of the whole tensor; `view` begins with row `first`."""
    view[max(0, num_rows - first) :].zero_()
