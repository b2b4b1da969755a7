"""Process groups, created once each and shared by all models of a process."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d


class GroupCache:
    """This rank's process groups by their ranks, each created once, by its members only.

    A Gloo group keeps a thread that wakes up about 100 times a second. So both sides of a refit, and all models that
    one process builds, share their groups, and all axes of size 1 share the group of this rank alone: both versions of
    Megatron take None for the default group. The group of all ranks is the default group.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def __len__(self) -> int:
        """Number of groups in whose creation this rank took part."""
        return len(self._groups)

    def get(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The group of these ranks, given in ascending order; None on a rank outside it.

        Collective: every rank of the group, with its groups in the same order. Where `is_split_from_default`, every
        rank of the default group.
        """
        key, default = tuple(ranks), dist.group.WORLD
        if len(key) == dist.get_world_size():
            return default
        split = is_split_from_default()
        if key not in self._groups and (split or dist.get_rank() in key):
            with _named_by_ranks(key):
                # On GPUs nothing on the CPU goes through these groups.
                backend = "nccl" if split else None
                made = dist.new_group(list(key), backend=backend, use_local_synchronization=not split)
            self._groups[key] = made if dist.get_rank() in key else None
        return self._groups.get(key)

    def close(self) -> None:
        """Destroy the groups that `get` created. The default group stays. Models on these groups become unusable.

        A group's threads end when nothing refers to it any more, models included. Collective: every rank of the default
        group.
        """
        groups, self._groups = self._groups, {}
        for group in groups.values():
            if group is not None:
                dist.destroy_process_group(group)


def is_split_from_default() -> bool:
    """Whether NCCL makes a new group by `ncclCommSplit`, which every rank of the default group has to call.

    So it is where the default group is bound to a device (`_new_process_group_helper` of torch).
    """
    default = dist.group.WORLD
    return default is not None and default.bound_device_id is not None


_NUM_MADE: Counter[tuple[int, ...]] = Counter()
"""How many groups of these ranks this process has made: the same number on all of them, as they make them together."""


@contextlib.contextmanager
def _named_by_ranks(ranks: tuple[int, ...]) -> Iterator[None]:
    """The group made in this context is named by its ranks and how often they have had one.

    torch (2.3 to 2.13) puts the number of groups that this rank has into the name by which members find each other.
    Ranks that belong to different numbers of groups would never meet. It also looks groups up by name, so a name is
    never used twice: the end of the older group would hide the newer one.
    """
    original = distributed_c10d._hash_ranks_to_str
    name = f"refit-{_NUM_MADE[ranks]}-{'_'.join(map(str, ranks))}"
    _NUM_MADE[ranks] += 1
    distributed_c10d._hash_ranks_to_str = lambda ranks: name
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str = original


_CACHES: WeakKeyDictionary[dist.ProcessGroup, GroupCache] = WeakKeyDictionary()
"""One cache per default group. It is dropped together with that group."""


def group_cache() -> GroupCache:
    """The cache of the current default group."""
    default = dist.group.WORLD
    assert default is not None, "there is no default process group"
    return _CACHES.setdefault(default, GroupCache())


def own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """This rank's group of `groups`, or None. Collective: every rank, with the same groups."""
    cache = group_cache()
    return next((group for group in [cache.get(ranks) for ranks in groups] if group is not None), None)
