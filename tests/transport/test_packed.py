"""Messages that an encoding packs, over every transport of CPUs: what arrives, is counted, and is found wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from refit.errors import RefitError
from refit.transport import packing
from refit.transport.base import TransportOptions, get_transport
from refit.transport.messages import HEADER_BYTES, Framing
from refit.transport.ranks import Ranks
from refit.transport.schedule import make_schedule
from refit.transport.two_sided import executor, gloo, nccl
from refit.transport.two_sided.backend import BackendTraits, BoundMessage
from tests.ranks.pool import RankPool
from tests.seams import nonzero_rows
from tests.transport import synthetic
from tests.transport.synthetic import own
from tests.transport.test_transports import BACKENDS, CASES, through_pinned_memory

pytestmark = pytest.mark.no_megatron

CASE = CASES["tp up, etp down"]
STAGING_BYTES = 16 << 10
"""So little that many tensors take several messages."""


def with_zero_rows(key: str, shape: tuple[int, ...], iteration: int) -> torch.Tensor:
    """Every other row is zeros."""
    found = CONTENT(key, shape, iteration).clone()
    rows = found.view(-1, shape[-1])
    rows[iteration % 2 :: 2] = 0
    return found


CONTENT = synthetic.content


def refits(rank: int, case: synthetic.Case, way: tuple[str, str], through: Any = contextlib.nullcontext) -> Any:
    """Wrong tensors of three refits, new storage in between, and what the report of the last counts."""
    plan = case.plan
    source, destination = case.memory(case.source, rank), case.memory(case.destination, rank)
    sent, received = nonzero_rows.packed(source), nonzero_rows.packed(destination)
    options = TransportOptions(
        staging_bytes=STAGING_BYTES, timeout_s=60.0, own=own(*way), max_bytes=nonzero_rows.max_bytes
    )
    wrong = []
    with through(), mock.patch.object(synthetic, "content", with_zero_rows):
        program = get_transport(way[0]).prepare(plan, Ranks.of_default_group(), sent, received, options)
        for iteration in range(3):
            torch.distributed.barrier()
            if source is not None:
                synthetic.fill(source, iteration)
            if destination is not None:
                synthetic.poison(destination)
            torch.distributed.barrier()
            report = program.run()
            if destination is not None:
                wrong += synthetic.wrong_tensors(destination, plan, iteration)
            for memory in filter(None, (source, destination)):
                for shard in memory:
                    shard.owner.data = shard.owner.data.clone()
                memory.refresh()
        staging = program.staging_bytes
        program.close()
    return wrong, report, staging


def check(answers: list[Any], case: synthetic.Case) -> None:
    assert [wrong for wrong, *_ in answers] == [[]] * len(answers)
    reports = [report for _, report, _ in answers]
    sent, received = sum(each.wire_bytes_sent for each in reports), sum(each.wire_bytes_received for each in reports)
    most, whole = sum(each.most_wire_bytes_sent for each in reports), int(case.plan.nbytes[case.plan.is_wire].sum())
    assert sent == received
    assert whole / 3 < sent < 0.8 * whole
    assert whole < most < 1.5 * whole
    assert all(0 <= staging <= STAGING_BYTES for *_, staging in answers)


@pytest.mark.parametrize("way", BACKENDS, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_every_byte_arrives_and_is_counted(ranks: RankPool, name: str, way: tuple[str, str]) -> None:
    case = CASES[name]
    answers = ranks.run(refits, case, way)
    if case.plan.is_wire.any():
        check(answers, case)
    else:
        assert [(wrong, report.wire_bytes_sent) for wrong, report, _ in answers] == [([], 0)] * len(answers)


def test_through_pinned_memory_only_what_was_packed_is_copied(ranks: RankPool) -> None:
    check(ranks.run(refits, CASE, ("gloo", "ring"), through_pinned_memory), CASE)


class Once:
    """Works of Gloo that may be waited for again, as NCCL's may."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = list(works)

    def wait(self) -> None:
        while self._works:
            self._works.pop().wait()


class GlooPairs:
    """What NCCL's links do, over Gloo, whose receives are posted with the length that both ends have agreed on."""

    def __init__(self, links: gloo.GlooLinks) -> None:
        self._links = links
        self.sent_bytes = 0

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> list[Any]:
        works = [self._links.receive(bound.buffer, bound.peer) for bound in receives]
        self.sent_bytes += sum(bound.buffer.numel() for bound in sends)
        return [Once(works + [self._links.send(bound.buffer, bound.peer) for bound in sends])]


def refits_by_nccl_rounds(rank: int, case: synthetic.Case) -> Any:
    """As `refits`, with the backend for NCCL on a machine without CUDA; and what was sent in all, lengths included."""
    made: list[GlooPairs] = []

    def backend(links: gloo.GlooLinks, timeout_s: float) -> nccl.NcclBackend:
        made.append(GlooPairs(links))
        return nccl.NcclBackend(links.rank, timeout_s, torch.device("cpu"), made[0])  # type: ignore[arg-type]

    stream = mock.Mock()
    streams = mock.Mock(pack=stream, transfer=stream, unpack=stream)
    with (
        mock.patch.object(gloo, "GlooBackend", backend),
        mock.patch.object(nccl, "Streams", return_value=streams),
        mock.patch.object(nccl, "wait_for_events", return_value=[]),
        mock.patch.object(torch.cuda, "stream", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
    ):
        wrong, report, staging = refits(rank, case, ("gloo", "ring"))
    return wrong, report, staging, made[0].sent_bytes if made else 0


@pytest.mark.parametrize("name", CASES)
def test_nccl_sends_what_was_packed_and_its_length(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    answers = ranks.run(refits_by_nccl_rounds, case)
    assert [wrong for wrong, *_ in answers] == [[]] * len(answers)
    for _, report, _, sent_bytes in answers:
        lengths = sent_bytes - 3 * report.wire_bytes_sent  # of three refits, which pack as much
        assert 0 <= lengths <= 0.2 * sent_bytes
        assert lengths % 8 == 0
        assert sent_bytes <= 0.8 * 3 * report.most_wire_bytes_sent


@contextmanager
def header_changed_by(change: int) -> Iterator[None]:
    run_pieces = packing.PackBatch.run_pieces

    def wrong(self: packing.PackBatch) -> None:
        run_pieces(self)
        self._header.add_(change)

    with mock.patch.object(packing.PackBatch, "run_pieces", wrong):
        yield


@contextmanager
def length_told_beyond_the_most() -> Iterator[None]:
    pack = nonzero_rows.RowEncoder.pack

    def wrong(self: Any, payload: torch.Tensor, length: torch.Tensor) -> None:
        pack(self, payload, length)
        length.fill_(len(payload) + 1)

    with mock.patch.object(nonzero_rows.RowEncoder, "pack", wrong):
        yield


FAULTS: dict[str, tuple[Any, str]] = {
    "far too long": (partial(header_changed_by, 1 << 40), "the header of a message from rank 0 says "),
    "below zero": (partial(header_changed_by, -(1 << 40)), "the header of a message from rank 0 says "),
    "a byte too long": (partial(header_changed_by, 1), "a message from rank 0 cannot be decoded: it has "),
    "a byte too short": (partial(header_changed_by, -1), "a message from rank 0 cannot be decoded: it "),
    "an encoder beyond the most": (length_told_beyond_the_most, "an encoder says that it packed "),
}


def faulty_refit(rank: int, way: tuple[str, str], fault: str) -> str | None:
    """The error of this rank, where rank 0 sends wrong messages. Every rank comes to an end."""
    options = TransportOptions(timeout_s=3.0, own=own(*way), max_bytes=nonzero_rows.max_bytes)
    source, destination = CASE.memory(CASE.source, rank), CASE.memory(CASE.destination, rank)
    sent, received = nonzero_rows.packed(source), nonzero_rows.packed(destination)
    program = get_transport(way[0]).prepare(CASE.plan, Ranks.of_default_group(), sent, received, options)
    if source is not None:
        with mock.patch.object(synthetic, "content", with_zero_rows):
            synthetic.fill(source, 0)
    with FAULTS[fault][0]() if rank == 0 else contextlib.nullcontext():
        try:
            program.run()
        except RefitError as error:
            return str(error)
    return None


@pytest.mark.parametrize("way", BACKENDS[:2], ids="-".join)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_length_is_named_and_hangs_nobody(ranks: RankPool, way: tuple[str, str], fault: str) -> None:
    try:
        answers = ranks.run(faulty_refit, way, fault)
    finally:
        ranks.stop()  # ranks that gave up in the middle of a refit have messages of it left
    said = FAULTS[fault][1]
    assert any(answer is not None and answer.startswith(said) for answer in answers), answers
    # The others either had nothing to do with rank 0, or name a rank that did not come within the time limit.
    assert all(answer is None or answer.startswith((said, "rank ")) for answer in answers), answers


@pytest.mark.parametrize("bucket_bytes", [256, 1000, 1 << 20])
def test_both_ends_divide_alike_and_no_message_exceeds_its_buffer(bucket_bytes: int) -> None:
    framing = Framing(bucket_bytes, 64, max_bytes=nonzero_rows.max_bytes)
    schedules = [make_schedule(CASE.plan, rank, framing) for rank in range(8)]
    sent = {(c.source, c.destination): c for schedule in schedules for c in schedule.sends}
    received = {(c.source, c.destination): c for schedule in schedules for c in schedule.receives}
    assert sent == received
    for (source, destination), channel in sent.items():
        pair = (CASE.plan.source == source) & (CASE.plan.destination == destination)
        assert sum(message.nbytes for message in channel.messages) == int(CASE.plan.nbytes[pair].sum())
        for message in channel.messages:
            assert message.buffer_bytes <= bucket_bytes
            most = sum(nonzero_rows.max_bytes(piece.tensor, piece.box) for piece in message.pieces)
            assert message.buffer_bytes == HEADER_BYTES + most


def test_packed_messages_may_be_longer_and_both_ends_know() -> None:
    """As those of GPUs over Gloo: fewer launches, and what crosses is what has changed."""
    traits = BackendTraits(None, bucket_bytes=2048, slots_per_peer=2, window=2, copies=2, packed_bytes=8192)
    counts = []
    for max_bytes in (None, nonzero_rows.max_bytes):
        options = TransportOptions(staging_bytes=1 << 20, max_bytes=max_bytes)
        schedules = [executor._schedule(CASE.plan, rank, traits, options) for rank in CASE.plan.ranks]
        sent = {(each.source, each.destination): each for schedule in schedules for each in schedule.sends}
        received = {(each.source, each.destination): each for schedule in schedules for each in schedule.receives}
        assert sent == received
        counts.append(sum(len(each.messages) for each in sent.values()))
        most = max(message.buffer_bytes for each in sent.values() for message in each.messages)
        assert most <= traits.most_bytes(is_packed=max_bytes is not None)
    assert counts[1] < counts[0] / 2
