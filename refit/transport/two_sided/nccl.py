"""NCCL: sends and receives between GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from refit.copies.batch import CopyBatch, load_kernels
from refit.errors import UnavailableError
from refit.memory.streams import late_peers_error, wait_for_events
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, Program, TransportOptions
from refit.transport.ranks import Ranks, check_own_gpus
from refit.transport.two_sided.backend import BackendTraits, BoundMessage, PendingRound, Streams, cut_to_length
from refit.transport.two_sided.executor import prepare_program
from refit.transport.two_sided.nccl_links import NcclLinks, connect_links


class NcclTransport:
    """Sends and receives over the communicators that `connect` creates and `Program.close` destroys."""

    name = "nccl"

    def __init__(self) -> None:
        self._links: NcclLinks | None = None

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        if not torch.cuda.is_available():
            raise UnavailableError("nccl needs CUDA GPUs, this machine has none: use --refit-method gloo or shm")
        if not dist.is_nccl_available():
            raise UnavailableError("nccl needs a torch built with NCCL: install a CUDA build of torch, or use gloo")
        check_own_gpus(self.name, options.ranks_per_gpu, "NCCL refuses two ranks on one GPU as invalid usage")

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected:
        """Create the communicators, connect every pair of the plan, and load the copy kernel. Once.

        Collective: every rank of the plan.
        """
        if self._links is None:
            device = torch.device("cuda", torch.cuda.current_device())
            self._links = connect_links(plan, ranks, device, options.timeout_s)
            load_kernels(device)
        return Connected(self._links.text)

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """See `Transport.prepare`. Collective: every rank of the plan."""
        self.connect(plan, ranks, options)
        assert self._links is not None
        device = torch.device("cuda", torch.cuda.current_device())
        backend = NcclBackend(ranks.rank, options.timeout_s, device, self._links)
        return prepare_program(plan, ranks.rank, backend, source, destination, options, self._disconnect)

    def _disconnect(self) -> None:
        if self._links is not None:
            self._links.close()
        self._links = None


class NcclBackend:
    """NCCL over CUDA memory: every round is one group of sends and receives per communicator, ordered by events. The
    host only enqueues. Where an encoding packs messages, a group before it has their lengths, for which the host waits.

    A round holds the messages of one step, so all ranks run their groups in the same order. Packing of round k + 1,
    transfer of round k and unpacking of round k - 1 overlap, each on a stream of its own. What is passed on makes the
    stream that packs wait for the one that has unpacked it, by events. Every message of a rank that passes something on
    has a batch for that, if only an empty one: also those that NCCL moves between the weights themselves.
    """

    # Few, large, packed messages: each costs about 25 us beyond its bytes (0.5 MiB messages reach 20 of 338 GB/s).
    # A pair gets a communicator's channels divided by its ranks, 32 / 4 = 8, and more only where a message would put
    # over 16 MiB on each (NCCL 2.28, addP2pToPlan): on 4 H200, 128 MiB reach 262 GB/s and 256 MiB reach 359.
    # 64 programs copy 1 TB/s, three times the speed of a link, and leave room for NCCL's kernels to start at once.
    traits = BackendTraits(
        direct_send_threshold=96 << 20,
        bucket_bytes=256 << 20,
        slots_per_peer=2,
        window=2,
        num_programs=64,
    )

    def __init__(self, rank: int, timeout_s: float, device: torch.device, links: NcclLinks) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._links = links
        self.streams = Streams(device)

    def begin(self) -> None:
        self.streams.begin()

    def wait_sent(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self.streams.pack):
            for work in pending.send_works:
                work.wait()

    def pack(self, sends: Sequence[BoundMessage]) -> None:
        with torch.cuda.stream(self.streams.pack):
            for bound in sends:
                if bound.batch is not None:
                    bound.batch.run()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        if not pending.receives and not pending.sends:
            return
        self.streams.transfer.wait_stream(self.streams.pack)
        if reused is not None and reused.unpacked is not None:
            self.streams.transfer.wait_event(reused.unpacked)
        with torch.cuda.stream(self.streams.transfer):
            works = self._links.exchange(*cut_to_length(pending.sends, pending.receives, self._exchange))
        # A group ends as a whole, so sends and receives wait for the same works.
        pending.send_works = pending.receive_works = works

    def _exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> None:
        """On the current stream. Raises RefitError, naming the peers, where time runs out."""
        for work in self._links.exchange(sends, receives):
            work.wait()
        if wait_for_events([torch.cuda.current_stream().record_event()], self._timeout_s):
            peers = {bound.peer for bound in (*sends, *receives)}
            raise late_peers_error(self._rank, peers, self._timeout_s)

    def wait_received(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self.streams.unpack):
            for work in pending.receive_works:
                work.wait()

    def unpack(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self.streams.unpack):
            for bound in pending.receives:
                if bound.batch is not None:
                    bound.batch.run()
            pending.unpacked = self.streams.unpack.record_event()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self.streams.local):
            batch.run()

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        """The one host synchronisation of a run. Raises RefitError, naming the peers of the first unfinished round."""
        posted = [(pending, pending.unpacked) for pending in rounds if pending.unpacked is not None]
        late = wait_for_events([unpacked for _, unpacked in posted], self._timeout_s)
        if late:
            first, _ = posted[late[0]]
            raise late_peers_error(self._rank, first.peers, self._timeout_s)
        self.streams.finish()
