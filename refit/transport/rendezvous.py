"""Rendezvous: the ranks of a plan exchange small values while they prepare. Idle ranks need not take part."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from refit.errors import RefitError
from refit.transport.ranks import Ranks


class Rendezvous:
    """Uses the store of `ranks`, because collectives of a process group would need its idle ranks too.

    `members` are those that meet. `store` is theirs for this use alone.
    """

    def __init__(self, ranks: Ranks, name: str, members: Sequence[int], timeout_s: float) -> None:
        """`name` is equal on all `members`. Each of them must construct and use it the same number of times."""
        self.ranks = ranks
        self.rank = ranks.rank
        self.members = tuple(members)
        self._timeout_s = timeout_s
        # The number of a rank's uses of a name keeps the keys of successive preparations apart.
        use = ranks.store.add(f"refit/{name}/uses/{self.rank}", 1)
        self.store: Store = PrefixStore(f"refit/{name}/{use}", ranks.store)
        self._round = 0

    def exchange(self, value: Any, wanted: Iterable[int] | None = None) -> dict[int, Any]:
        """Publish `value`; return rank -> value that it published in the same call, of the `wanted` ranks or all.

        Collective: every rank must call. Raises RefitError, naming the rank, where one does not call in time.
        """
        self._round += 1
        key = str(self._round)
        self.publish(key, value)
        return self._fetched(self.members if wanted is None else tuple(wanted), key)

    def publish(self, key: str, value: Any) -> None:
        """Store `value` under this rank's `key`. A number as `key` is one of `exchange`."""
        packed = zlib.compress(pickle.dumps(value), 1)
        self.store.set(f"{key}/{self.rank}", packed)  # type: ignore[arg-type]  # bytes are accepted

    def fetch(self, rank: int, key: str) -> Any:
        """The value that `rank` has published under `key`. Raises RefitError, naming the rank, after the timeout."""
        return self._fetched((rank,), key)[rank]

    def _fetched(self, ranks: Sequence[int], key: str) -> dict[int, Any]:
        """As `fetch`, of several ranks at once: two questions to the store for all of them, not two for each."""
        if not ranks:
            return {}
        names = [f"{key}/{rank}" for rank in ranks]
        try:
            self.store.wait(names, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            late = next((rank for rank in ranks if not self.store.check([f"{key}/{rank}"])), ranks[0])
            raise RefitError(
                f"rank {late} did not come to the refit within {self._timeout_s:g} s (--timeout)"
            ) from error
        has_multi_get = self.store.has_extended_api()  # type: ignore[attr-defined]  # torch's type hints lack it
        packed = self.store.multi_get(names) if has_multi_get else map(self.store.get, names)
        return {rank: pickle.loads(zlib.decompress(each)) for rank, each in zip(ranks, packed, strict=True)}

    def forget(self, key: str) -> None:
        """Nobody fetches this rank's `key` again."""
        self.store.delete_key(f"{key}/{self.rank}")

    def agree(self, problem: RefitError | None) -> None:
        """Raise the problem of the first rank that has one, on every rank. Collective.

        No rank then waits for one that has given up.
        """
        problems = [found for found in self.exchange(problem).values() if found is not None]
        if problems:
            raise problems[0]
