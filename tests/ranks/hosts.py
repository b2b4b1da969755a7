"""Ranks of a pool on one machine that take it for several hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


@contextmanager
def hosts_of(rank: int, ranks_per_host: int) -> Iterator[None]:
    """Hosts `host0`, `host1`, ... of `ranks_per_host` each. Collective: every rank of the pool.

    What ranks have stored of their hosts when they met before is forgotten.
    """
    with mock.patch.dict(os.environ, REFIT_HOST=f"host{rank // ranks_per_host}"):
        _forget(rank)
        yield
    _forget(rank)


def _forget(rank: int) -> None:
    dist.barrier()
    store = _get_default_store()
    store.delete_key(f"refit/host/{rank}")
    if rank == 0:
        store.delete_key("refit/hosts")
    dist.barrier()
