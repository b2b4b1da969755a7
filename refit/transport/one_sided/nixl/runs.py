"""Runs of bytes that are contiguous at both ends, found from strides here and those that a peer has stated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from refit.copies.copy import Copy
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights
from refit.transport.messages import Channel, Message
from refit.transport.one_sided.nixl.library import Region
from refit.transport.one_sided.places import Place, mapped_weights

LEAST_RUN_BYTES = 8 << 10
"""Runs from here on are written in place. A shorter one costs UCX more than packing and unpacking it."""

TOGETHER_BYTES = 32 << 20
"""The most that is written in place as one message."""

ADDRESSES = 1 << 57
"""More than any address in user space, with five levels of page tables too."""

Rows = np.ndarray[Any, Any]
"""Descriptors, uint64 `[number, 3]`: address, bytes, device."""


def put_together(channel: Channel, staged: Sequence[int]) -> tuple[Channel, list[int]]:
    """The channel with neighbours that are written in place as one message, and the new numbers of `staged` ones.

    A message costs some 100 us of Python at both ends, a descriptor a microsecond. Only messages of the first stage:
    they wait for nothing but those before them in their channel, so whoever waits for one of them waits for all that
    go with it, and no more. What is passed on stays in the messages that the schedule's argument is about.
    """
    known, messages, numbers = set(staged), list[Message](), list[int]()
    for number, message in enumerate(channel.messages):
        last = messages[-1] if messages else None
        in_place = number not in known
        joins = in_place and last is not None and len(messages) - 1 not in numbers[-1:]
        if joins and last is not None and last.stage == message.stage == 0 and _fit(last, message):
            both = (*last.pieces, *message.pieces)
            messages[-1] = replace(message, pieces=both, nbytes=last.nbytes + message.nbytes)
            continue
        if not in_place:
            numbers.append(len(messages))
        messages.append(message)
    return replace(channel, messages=tuple(messages)), numbers


def _fit(one: Message, other: Message) -> bool:
    return one.nbytes + other.nbytes <= TOGETHER_BYTES


def run_bytes(copy: Copy) -> int | None:
    """The bytes of each run that is contiguous at both ends; None where the copy casts."""
    shape = _split(copy)
    return None if shape is None else shape[1] * copy.source.element_size()


def runs_of(copy: Copy) -> Rows:
    """The runs of a copy that does not cast, uint64 `[number, 3]`: address of the source, of the destination, bytes.

    The destination is at an address of another process, which its storage's offset stands for (`weights_at`). Two rows
    of three elements, in rows of five at the source and of four at the destination, are two runs:

        source    . . a b c        destination    . a b c
                  . . d e f                       . d e f
    """
    split = _split(copy)
    assert split is not None
    num_outer, run = split
    source, destination = copy.source, copy.destination
    size = source.element_size()
    offsets = np.zeros((1, 2), dtype=np.int64)
    for dim in range(num_outer):
        steps = np.arange(source.shape[dim], dtype=np.int64)[:, None] * (source.stride(dim), destination.stride(dim))
        offsets = (offsets[:, None] + steps[None]).reshape(-1, 2)
    first = np.array([source.data_ptr(), destination.storage_offset() * size], dtype=np.int64)
    found = np.empty((len(offsets), 3), dtype=np.uint64)
    found[:, :2] = first + offsets * size
    found[:, 2] = run * size
    return found


def _split(copy: Copy) -> tuple[int, int] | None:
    """How many leading dims are not in one run, and the elements of a run; None where the copy casts."""
    source, destination = copy.source, copy.destination
    if source.dtype != destination.dtype:
        return None
    run, dim = 1, source.ndim
    while dim and (source.shape[dim - 1] == 1 or source.stride(dim - 1) == destination.stride(dim - 1) == run):
        run *= source.shape[dim - 1]
        dim -= 1
    return dim, run


def copies_to(message: Message, source: LocalWeights, target: LocalWeights) -> Iterator[Copy]:
    """As `weight_copies`, to a target in another process, whose addresses say nothing here."""
    for piece in message.pieces:
        for part in piece.tensor.memory_boxes(piece.box):
            for view in target.views(piece.tensor.key, part):
                for origin in source.views(piece.tensor.key, view.box):
                    yield Copy(part_within(view.data, view.box, origin.box), origin.data)


def weights_at(places: Iterable[Place]) -> LocalWeights:
    """Weights of a peer as tensors without data, each at its address there: that is its offset in their storage."""
    return mapped_weights([torch.empty(ADDRESSES, dtype=torch.uint8, device="meta")], places)


def descriptors(addresses: Rows, sizes: Rows, regions: Sequence[Region]) -> Rows:
    """Descriptors with the device numbers of the `regions` that they lie in. Regions are sorted by address."""
    starts = np.array([region.address for region in regions], dtype=np.uint64)
    devices = np.array([region.device for region in regions], dtype=np.uint64)
    within = np.searchsorted(starts, addresses, side="right") - 1
    return np.stack([addresses, sizes, devices[within]], axis=1)


def descriptor(address: int, nbytes: int, device: int) -> Rows:
    return np.array([[address, nbytes, device]], dtype=np.uint64)
