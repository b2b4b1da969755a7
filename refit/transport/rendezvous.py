"""Rendezvous: the ranks of a plan exchange small values while they prepare, without the ranks that take no part."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from refit.errors import RefitError


class Rendezvous:
    """Goes through the default process group's store: collectives of that group would need its idle ranks too."""

    def __init__(self, name: str, ranks: Sequence[int], timeout_s: float) -> None:
        """`name` is equal on all `ranks`; each must construct and use it the same number of times."""
        self.rank = dist.get_rank()
        self.ranks = tuple(ranks)
        self._timeout_s = timeout_s
        store = _get_default_store()
        # Counting each rank's uses of a name keeps the keys of one preparation apart from those of the one before.
        use = store.add(f"refit/{name}/uses/{self.rank}", 1)
        self._store = PrefixStore(f"refit/{name}/{use}", store)
        self._round = 0

    def exchange(self, value: Any, wanted: Iterable[int] | None = None) -> dict[int, Any]:
        """Publish `value` and fetch what the `wanted` ranks published in the same call (all of them if not given).

        Collective: every rank must call. Raises RefitError, naming the rank, where one does not in time.
        """
        self._round += 1
        packed = zlib.compress(pickle.dumps(value), 1)
        self._store.set(f"{self._round}/{self.rank}", packed)  # type: ignore[arg-type]  # bytes are accepted
        return {rank: self._fetch(rank) for rank in (self.ranks if wanted is None else wanted)}

    def agree(self, problem: RefitError | None) -> None:
        """Raise the first rank's problem on every rank, so that none waits for one that has given up."""
        problems = [found for found in self.exchange(problem).values() if found is not None]
        if problems:
            raise problems[0]

    def _fetch(self, rank: int) -> Any:
        key = f"{self._round}/{rank}"
        try:
            self._store.wait([key], timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise RefitError(
                f"rank {rank} did not come to prepare the refit within {self._timeout_s:g} s (--timeout)"
            ) from error
        return pickle.loads(zlib.decompress(self._store.get(key)))
