"""Ranks: the processes that take part in refits, in place of torch.distributed's default process group."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from refit.config.gpus import GpuMap
from refit.errors import RefitError, UnavailableError, first_line


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job as plans number them, seen from one of them: this process is `rank` of `size`.

    They meet through `store`, any store of torch.distributed. Where other processes use the same server, theirs is a
    `PrefixStore`. `host_of[rank]` names a rank's host: ranks with equal names can map each other's memory.

    A process may belong to several, beside process groups of any size: an engine's worker has a default group already.
    """

    rank: int
    size: int
    store: Store
    host_of: tuple[str, ...]

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size == len(self.host_of)

    @classmethod
    def meet(cls, rank: int, size: int, store: Store) -> Ranks:
        """The ranks that meet at `store`, each with its own host's name.

        Collective: every rank. Raises RefitError, naming the rank, where one does not come within the store's timeout.
        """
        store.set(f"refit/host/{rank}", host_name())
        if rank == 0:  # reads for all, so that the traffic is linear in the number of ranks
            names = [_stored(store, f"refit/host/{other}", other) for other in range(size)]
            store.set("refit/hosts", json.dumps(names))
        return cls(rank, size, store, tuple(json.loads(_stored(store, "refit/hosts", 0))))

    @classmethod
    def of_default_group(cls) -> Ranks:
        """The ranks of torch.distributed's default process group. Collective: every rank of it."""
        return cls.meet(dist.get_rank(), dist.get_world_size(), _get_default_store())

    def hosts(self, ranks: Iterable[int]) -> list[str]:
        """The names of the hosts that `ranks` are on, each once."""
        return sorted({self.host_of[rank] for rank in ranks})


def host_name() -> str:
    """The host of this process. The only place that decides which ranks share one."""
    return socket.gethostname()


def gpus_here(ranks_per_gpu: int) -> GpuMap:
    """Which GPU each of this host's ranks uses, by what torchrun has started. Hosts are taken to have equally many."""
    return GpuMap(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), ranks_per_gpu)


def check_own_gpus(method: str, ranks_per_gpu: int, why: str) -> None:
    """Raise UnavailableError, with the reason `why` and what to use, where ranks of this host share a GPU."""
    gpus = gpus_here(ranks_per_gpu)
    if gpus.is_shared:
        raise UnavailableError(
            f"{method} needs a GPU per rank, and --ranks-per-gpu {ranks_per_gpu} puts {gpus.ranks_per_host} ranks on "
            f"{gpus.gpus_per_host} ({why}): use --refit-method cuda-ipc, or gloo with --device cuda"
        )


def _stored(store: Store, key: str, rank: int) -> str:
    """The value of `key`, which `rank` stores."""
    try:
        return store.get(key).decode()
    except RuntimeError as error:
        raise RefitError(f"rank {rank} did not come to meet the other ranks: {first_line(error)}") from error
