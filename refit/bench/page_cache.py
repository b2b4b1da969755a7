"""Drops files from the page cache, so that reading them is timed as a first read."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

NUM_PROBES = 16
"""Places of each file that are looked for in the page cache."""

MAX_TRIES = 3
"""A page that was just read waits in a list of its core's, where the kernel may not find it the first time."""


def drop(paths: Collection[Path]) -> float | None:
    """Have the kernel forget the pages of these files. It keeps those of memory file systems, and mapped ones.

    Returns the share of places in them that are then not in the page cache; None where the file system does not say.
    """
    share = None
    for _ in range(MAX_TRIES):
        for path in paths:
            _forget(path)
        share = _cold_share(paths)
        for path in paths:
            _forget(path)  # looking for a page reads it
        if share in (None, 1.0):
            break
    return share


def _forget(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fdatasync(descriptor)  # pages that are not on disk yet are kept
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _cold_share(paths: Collection[Path]) -> float | None:
    num_cold = num_places = 0
    for path in paths:
        with _opened(path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no page beyond the one that is looked for
            size = os.fstat(descriptor).st_size
            for place in range(NUM_PROBES):
                try:
                    os.preadv(descriptor, [bytearray(1)], size * place // NUM_PROBES, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno != errno.EAGAIN:
                        return None
                    num_cold += 1
                num_places += 1
    return num_cold / num_places if num_places else None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
