"""NIXL as a substrate of the one-sided executor: writes by prepared lists, and notifications as counters."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from refit.copies.batch import CopyBatch
from refit.errors import RefitError
from refit.memory.streams import late_peers_error
from refit.transport.one_sided.nixl.library import NOTE, Agent, Registration
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.packing import PackBatch
from refit.transport.rendezvous import Rendezvous

LOCAL_BATCH_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}


@dataclass(frozen=True, slots=True)
class NixlPut(Put):
    """A put that ends in `write`: it sends what `batch` has packed, or weights where they are, after its hooks.

    Where `write` is None, how much `batch` packs is known once it has run: `rows` are the descriptors, one here and one
    there, of the most that it packs.
    """

    write: Any = None
    rows: tuple[Any, Any] = ((), ())


@dataclass(frozen=True, slots=True)
class _Peer:
    """`name` is that of its agent, `inbox` the one that it has opened for these ranks."""

    name: str
    inbox: int


@dataclass(slots=True)
class _Heard:
    """What a peer has notified. Messages may arrive in another order than they were sent, and more than once."""

    arrived: set[int]
    credit: int = 0
    moved: int = 0


class NixlMemory:
    """The `PeerMemory` of ranks on any hosts. Nothing is mapped. The host polls, and makes progress by that."""

    enqueues = False

    def __init__(self, rendezvous: Rendezvous, agent: Agent, device: torch.device, timeout_s: float) -> None:
        """Weights are on `device`. Collective: every member of the rendezvous."""
        self.rank = rendezvous.rank
        self.device = device
        self.local_batch_bytes = LOCAL_BATCH_BYTES[device.type]
        self._rendezvous = rendezvous
        self._agent = agent
        self._timeout_s = timeout_s
        self._heard: defaultdict[int, _Heard] = defaultdict(lambda: _Heard(set()))
        self._moves: defaultdict[int, int] = defaultdict(int)
        self._peers: dict[int, _Peer] = {}
        self._under_way: list[tuple[int, Any]] = []
        self._registrations: list[Registration] = []
        self._inbox = agent.open_inbox(self._take)
        self._is_settled = True

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        return self._rendezvous.exchange(value, wanted)

    def publish(self, key: str, value: Any) -> None:
        self._rendezvous.publish(key, value)

    def fetch(self, rank: int, key: str) -> Any:
        return self._rendezvous.fetch(rank, key)

    def register_everywhere(self, memories: Sequence[torch.Tensor]) -> Registration:
        """As `register`. Raises the same RefitError on all ranks where one cannot. Collective."""
        found, problem = Registration((), None), None
        try:
            found = self.register(memories)
        except RefitError as error:
            problem = error
        self._rendezvous.agree(problem)
        return found

    def register(self, memories: Sequence[torch.Tensor]) -> Registration:
        """Register memory until `deregister` or `close`. Raises RefitError where NIXL cannot."""
        found = self._agent.register(memories)
        self._registrations.append(found)
        return found

    def deregister(self, registration: Registration) -> None:
        self._registrations.remove(registration)
        self._agent.deregister(registration)

    def offered(self, registration: Registration) -> bytes:
        """What `meet` takes at a peer, so that it can write the registered memory."""
        return self._agent.metadata(registration)

    @property
    def inbox(self) -> int:
        """Where peers notify this rank."""
        return self._inbox

    def meet(self, rank: int, inbox: int, offered: bytes) -> None:
        """Take in what `rank` has offered. Raises RefitError, naming it, where it cannot be reached."""
        try:
            self._peers[rank] = _Peer(self._agent.meet(offered), inbox)
        except RefitError as error:
            raise RefitError(f"rank {self.rank} and rank {rank}: {error}") from error

    def learn(self, rank: int, offered: bytes) -> None:
        """Take in what `rank`, which this one has met, offers besides. Raises RefitError as `meet` does."""
        self.meet(rank, self._peers[rank].inbox, offered)

    def listed(self, peer: int | None, rows: Any) -> Any:
        """A prepared list of descriptors, `[number, 3]`: in memory of `peer`, or of this rank."""
        name = None if peer is None else self._peers[peer].name
        return self._agent.listed(name, rows, "VRAM" if self.device.type == "cuda" else "DRAM")

    def write(self, own: Any, theirs: Any, numbers: Any) -> Any:
        """See `Agent.write`."""
        return self._agent.write(own, theirs, numbers)

    def begin(self, has_new_copies: bool) -> None:
        self._is_settled = False
        # Credit, which follows, allows peers to overwrite weights that the caller's stream may still be using.
        self._synchronise()

    def send(self, peer: int, put: Put, value: int) -> None:
        assert isinstance(put, NixlPut)
        put.batch.run()
        self._synchronise()
        with self._naming(peer):
            write = put.write or self._packed(peer, put)
            if not self._agent.start(write, self._note(peer, Counter.ARRIVED, value)):
                self._under_way.append((peer, write))

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        batch.run()
        self._synchronise()  # before credit for the same slot

    def copy_local(self, batch: CopyBatch) -> None:
        batch.run()

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        if counter is Counter.MOVED:
            self._moves[peer] = value  # every notification that follows says so
            return
        with self._naming(peer):
            self._agent.notify(self._peers[peer].name, self._note(peer, counter, value))

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        if not self._has_heard(peer, counter, value):
            self._progress()
        return self._has_heard(peer, counter, value)

    def finish(self) -> None:
        self._synchronise()
        deadline = time.monotonic() + self._timeout_s
        while self._under_way:
            self._progress()
            if self._under_way and time.monotonic() > deadline:
                raise late_peers_error(self.rank, [peer for peer, _ in self._under_way], self._timeout_s)
        for heard in self._heard.values():
            heard.arrived.clear()
        self._is_settled = True

    def barrier(self) -> None:
        self.exchange(None)

    def close(self) -> None:
        """Collective, unless a run has failed: nothing is deregistered that a peer still writes."""
        if self._is_settled:
            self.barrier()
        self.abandon()

    def abandon(self) -> None:
        """Deregister all, and hear nothing more."""
        self._agent.close_inbox(self._inbox)
        self._under_way.clear()
        for registration in self._registrations:
            self._agent.deregister(registration)
        self._registrations = []
        self._peers = {}

    def _packed(self, peer: int, put: NixlPut) -> Any:
        """The write of as much as `put` has packed."""
        assert isinstance(put.batch, PackBatch)
        own, theirs = (rows.copy() for rows in put.rows)
        own[0, 1] = theirs[0, 1] = put.batch.moved_bytes
        return self._agent.write(self.listed(None, own), self.listed(peer, theirs), np.zeros(1, dtype=np.int32))

    def _synchronise(self) -> None:
        """NIXL knows of no stream: what it reads has been written before, and what it may write is not in use."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _note(self, peer: int, counter: Counter, value: int) -> bytes:
        return NOTE.pack(self._peers[peer].inbox, self.rank, counter, value, self._moves[peer])

    def _take(self, peer: int, counter: int, value: int, moved: int) -> None:
        heard = self._heard[peer]
        heard.moved = max(heard.moved, moved)
        if counter == Counter.ARRIVED:
            heard.arrived.add(value)
        else:
            heard.credit = max(heard.credit, value)

    def _has_heard(self, peer: int, counter: Counter, value: int) -> bool:
        heard = self._heard[peer]
        if counter is Counter.ARRIVED:
            return value in heard.arrived
        return value <= (heard.credit if counter is Counter.CREDIT else heard.moved)

    def _progress(self) -> None:
        self._agent.poll()
        left = []
        for peer, write in self._under_way:
            with self._naming(peer):
                if not self._agent.has_ended(write):
                    left.append((peer, write))
        self._under_way = left

    @contextlib.contextmanager
    def _naming(self, peer: int) -> Iterator[None]:
        """Errors of NIXL name `peer`."""
        try:
            yield
        except self._agent.errors as error:
            self._is_settled = False
            raise RefitError(
                f"rank {peer} cannot be reached over NIXL's {self._agent.backend} ({self._agent.said(error)}): "
                "that rank has failed, or has closed its memory"
            ) from error
