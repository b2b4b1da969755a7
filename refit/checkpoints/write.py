"""Writes the weights of a side as a folder of safetensors: each rank its own boxes into the files that all share.

The folder is made under another name beside its own, `.NAME.partial`, and gets its name in the end, in one step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from refit.checkpoints.contents import Contents, StoredPiece
from refit.checkpoints.files import CONFIG_NAME, INDEX_NAME
from refit.checkpoints.layout import PlannedFolder
from refit.checkpoints.read import runs_of
from refit.errors import RefitError
from refit.memory.views import part_within
from refit.memory.weights import LocalShard


def create(planned: PlannedFolder, config: Mapping[str, Any], beside: Collection[Path]) -> None:
    """Make the folder with files of their full size, headers written, and the index and config.json.

    `beside` are files that are copied into it, such as those of a tokenizer. On one rank.
    Raises RefitError, after removing what was made, where there is no space.
    """
    try:
        planned.partial.mkdir(parents=True, exist_ok=False)
        for path, header in planned.headers.items():
            with path.open("xb") as file:
                file.write(header)
                os.posix_fallocate(file.fileno(), 0, planned.sizes[path])
        if planned.index is not None:
            (planned.partial / INDEX_NAME).write_text(json.dumps(planned.index, indent=2) + "\n", encoding="utf-8")
        (planned.partial / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in beside:
            shutil.copyfile(path, planned.partial / path.name)
    except OSError as error:
        discard(planned.partial)
        raise _no_place(planned, error) from error


def write(planned: PlannedFolder, contents: Contents, shards: Iterable[LocalShard]) -> int:
    """Write these shards into the files of a folder that `create` has made. Returns the bytes that were written.

    Raises RefitError where that is not possible.
    """
    files: dict[Path, int] = {}
    num_bytes = 0
    try:
        for shard in shards:
            for piece in contents.pieces_of(shard.tensor.key, shard.box):
                num_bytes += _write_piece(files, piece, part_within(shard.view.detach(), shard.box, piece.box))
        for descriptor in files.values():
            os.fsync(descriptor)
    except OSError as error:
        raise _no_place(planned, error) from error
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return num_bytes


def finish(planned: PlannedFolder) -> None:
    """Give the folder its name. On one rank. Raises RefitError where it has been taken meanwhile."""
    try:
        planned.partial.rename(planned.folder)  # an empty folder of that name is replaced
    except OSError as error:
        discard(planned.partial)
        raise _no_place(planned, error) from error


def discard(partial: Path) -> None:
    """Remove what was written so far."""
    shutil.rmtree(partial, ignore_errors=True)


def _write_piece(files: dict[Path, int], piece: StoredPiece, data: torch.Tensor) -> int:
    tensor = piece.weights.tensor
    if tensor.path not in files:
        files[tensor.path] = os.open(tensor.path, os.O_WRONLY)
    lacking = data.ndim - len(piece.axes)
    data = data[(0,) * lacking].permute(_inverse(piece.axes)).reshape(piece.held.extents)
    memory = data.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    runs, itemsize = runs_of(piece.held, piece.weights.shape), data.element_size()
    length = runs.length * itemsize
    for number, start in enumerate(runs.starts):
        part, done = memory[number * length : (number + 1) * length], 0
        while done < length:
            done += os.pwrite(files[tensor.path], part[done:], tensor.offset + start * itemsize + done)
    return len(memory)


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The places in `axes` of the dims that it has, in their order."""
    return tuple(axes.index(dim) for dim in sorted(axes))


def _no_place(planned: PlannedFolder, error: OSError) -> RefitError:
    return RefitError(f"{planned.folder} cannot be written ({planned.nbytes:,} bytes): {error.strerror}")
