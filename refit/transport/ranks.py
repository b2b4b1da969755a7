"""Ranks: the processes that take part in refits, in place of torch.distributed's default process group."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from refit.config.gpus import GpuMap
from refit.errors import RefitError, UnavailableError, UsageError, first_line


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
            store.set("refit/hosts", json.dumps(_plain(names)))
        return cls(rank, size, store, tuple(json.loads(_stored(store, "refit/hosts", 0))))

    @classmethod
    def of_default_group(cls) -> Ranks:
        """The ranks of torch.distributed's default process group. Collective: every rank of it."""
        return cls.meet(dist.get_rank(), dist.get_world_size(), _get_default_store())

    def hosts(self, ranks: Iterable[int]) -> list[str]:
        """The names of the hosts that `ranks` are on, each once."""
        return sorted({self.host_of[rank] for rank in ranks})

    @property
    def ranks_per_host(self) -> int:
        """Ranks on each host but the last, which may have fewer. Ranks fill hosts in order.

        Raises UsageError where they do not: plans, GPUs and clusters number them so.
        """
        per_host, names = self.host_of.count(self.host_of[0]), list(dict.fromkeys(self.host_of))
        in_order = [name for name in names for _ in range(per_host)]
        if list(self.host_of) != in_order[: self.size]:
            counts = ", ".join(f"{self.host_of.count(name)} on {name}" for name in names[:4])
            raise UsageError(
                f"{self.size} ranks do not fill {len(names)} hosts in order, {per_host} on each ({counts}): start "
                "equally many on each host, one host after the other"
            )
        return per_host


SEPARATOR = " in network namespace "


def host_name() -> str:
    """The host of this process. The only place that decides which ranks share one.

    It is what the launcher says (REFIT_HOST), else the machine's name with the network namespace: what reaches others
    by an address of its own is a host, also where one machine stands for several.
    """
    named = os.environ.get("REFIT_HOST")
    if named:
        return named
    try:
        return f"{socket.gethostname()}{SEPARATOR}{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _plain(names: Sequence[str]) -> list[str]:
    """`names` without the namespace, where it tells no two of them apart."""
    machines = {name: name.partition(SEPARATOR)[0] for name in names}
    several = Counter(machines.values())
    return [machines[name] if several[machines[name]] == 1 else name for name in names]


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
