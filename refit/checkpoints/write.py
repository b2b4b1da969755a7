"""Writes the weights of a side as a folder of safetensors: each rank its own boxes into the files that all share.

The folder is made under another name beside its own, `.NAME.partial`, and gets its name in the end, in one step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refit.checkpoints.contents import Contents, StoredWeights
from refit.checkpoints.files import CONFIG_NAME, INDEX_NAME
from refit.checkpoints.layout import PlannedFolder
from refit.checkpoints.read import CHUNK_BYTES, chunks, runs_of, widened
from refit.errors import RefitError
from refit.memory.views import part_within
from refit.memory.weights import LocalShard
from refit.plan.box import Box


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
        for weights, held in _by_tensor(contents, shards):
            path = weights.tensor.path
            if path not in files:
                files[path] = os.open(path, os.O_WRONLY)
            num_bytes += _write_tensor(files[path], weights, held)
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


@dataclass(frozen=True, slots=True)
class _Held:
    """`box` of a tensor in a file: `data`, a view of the weights with dims in the order of the file."""

    box: Box
    data: torch.Tensor


def _by_tensor(contents: Contents, shards: Iterable[LocalShard]) -> Iterable[tuple[StoredWeights, list[_Held]]]:
    """What the shards have of each tensor of the files."""
    found: dict[str, tuple[StoredWeights, list[_Held]]] = {}
    for shard in shards:
        for piece in contents.pieces_of(shard.tensor.key, shard.box):
            data = part_within(shard.view.detach(), shard.box, piece.box)
            # Each has dims of a single element that the other has not: here those in front, there any.
            data = data[(0,) * (data.ndim - len(piece.axes))].permute(_inverse(piece.axes))
            for dim in range(len(piece.held.extents)):
                data = data if dim in piece.axes else data.unsqueeze(dim)
            _, held = found.setdefault(piece.weights.tensor.name, (piece.weights, []))
            held.append(_Held(piece.held, data))
    return found.values()


def _write_tensor(descriptor: int, weights: StoredWeights, held: Sequence[_Held]) -> int:
    """Write disjoint parts of a tensor. Short ones that lie in turn, as gate and up of gpt-oss, go together."""
    num_bytes, together = 0, list[Box]()
    for each in held:
        if any(box.contains(each.box) for box in together):
            continue
        wide = widened(each.box, weights.shape, each.data.element_size())
        found = [part for other in held if (part := other.box.intersect(wide)) is not None]
        if sum(part.volume for part in found) == wide.volume:
            together.append(wide)
        else:
            num_bytes += _write_box(descriptor, weights, each.box, [each])
    return num_bytes + sum(_write_box(descriptor, weights, box, held) for box in together)


def _write_box(descriptor: int, weights: StoredWeights, box: Box, held: Sequence[_Held]) -> int:
    """Write a box which parts of `held` fill."""
    num_bytes = 0
    for part in chunks(box, CHUNK_BYTES // held[0].data.element_size()):
        data = torch.empty(part.extents, dtype=held[0].data.dtype)
        for each in held:
            inner = each.box.intersect(part)
            if inner is not None:
                data[inner.slices_within(part)] = each.data[inner.slices_within(each.box)].cpu()
        memory = data.view(-1).view(torch.uint8).numpy().data
        runs, itemsize = runs_of(part, weights.shape), data.element_size()
        length = runs.length * itemsize
        for number, start in enumerate(runs.starts):
            run, done = memory[number * length : (number + 1) * length], 0
            while done < length:
                done += os.pwrite(descriptor, run[done:], weights.tensor.offset + start * itemsize + done)
        num_bytes += len(memory)
    return num_bytes


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The places in `axes` of the dims that it has, in their order."""
    return tuple(axes.index(dim) for dim in sorted(axes))


def _no_place(planned: PlannedFolder, error: OSError) -> RefitError:
    return RefitError(f"{planned.folder} cannot be written ({planned.nbytes:,} bytes): {error.strerror}")
