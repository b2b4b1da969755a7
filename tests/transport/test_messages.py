"""Framing is pure, equal at both ends, complete, bounded and cheap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.planner import plan_refit
from refit.plan.sharding import RankSharding, ReplicatedShard, Sharding, TensorSharding, TensorSpec
from refit.transport.messages import (
    ALIGNMENT,
    MIN_BUCKET_BYTES,
    Channel,
    Framing,
    Message,
    bucket_bytes,
    even_framing,
    num_peers,
    pair_buckets,
)
from refit.transport.schedule import make_schedule
from tests.transport.synthetic import Case

CASE = Case(Layout(4, 4, 1, 1, 4), Layout(2, 1, 2, 1, 2, first_rank=4), hidden=96, ffn=192)


def _messages(case: Case, rank: int, framing: Framing) -> list[Message]:
    return [message for channel in make_schedule(case.plan, rank, framing).receives for message in channel.messages]


@pytest.mark.parametrize("framing", [Framing(256, None), Framing(4096, 2048), Framing(1 << 20, 1 << 10)])
def test_both_ends_frame_alike(framing: Framing) -> None:
    schedules = {rank: make_schedule(CASE.plan, rank, framing) for rank in range(6)}
    sent = {(c.source, c.destination): c for s in schedules.values() for c in s.sends}
    received = {(c.source, c.destination): c for s in schedules.values() for c in s.receives}
    assert sent == received
    assert len(sent) > 4


@pytest.mark.parametrize("framing", [Framing(1000, None), Framing(4096, 2048), Framing(1 << 20, 1 << 10)])
@pytest.mark.parametrize("rank", [4, 5])
def test_messages_cover_the_plan_within_the_bucket(framing: Framing, rank: int) -> None:
    messages = _messages(CASE, rank, framing)
    assert all(message.nbytes <= framing.bucket_bytes for message in messages)
    pieces = [piece for message in messages for piece in message.pieces]
    wanted = CASE.plan.for_rank(rank).receives
    assert sum(piece.nbytes for piece in pieces) == sum(transfer.nbytes for transfer in wanted)
    boxes: dict[str, list[Box]] = {}
    for piece in pieces:
        assert any(t.tensor == piece.tensor and t.box.contains(piece.box) for t in wanted)
        assert all(piece.box.intersect(other) is None for other in boxes.setdefault(piece.tensor.key, []))
        boxes[piece.tensor.key].append(piece.box)


@settings(max_examples=12, deadline=None)
@given(st.integers(2000, 200_000))
def test_even_framing_cuts_every_pair_into_as_many_messages(message_bytes: int) -> None:
    framing = even_framing(CASE.plan, message_bytes)
    assert framing.pair_bytes is not None
    sent = [channel for rank in range(6) for channel in make_schedule(CASE.plan, rank, framing).sends]
    totals = {_pair(channel): sum(message.nbytes for message in channel.messages) for channel in sent}
    num_messages = -(-max(totals.values()) // message_bytes)
    for channel in sent:
        assert all(message.nbytes <= framing.pair_bytes[_pair(channel)] for message in channel.messages)
        # A piece that does not fit leaves its message short.
        assert len(channel.messages) <= 2 * num_messages
        assert len(channel.messages) >= min(num_messages, totals[_pair(channel)] // MIN_BUCKET_BYTES)
    received = [c for rank in range(6) for c in make_schedule(CASE.plan, rank, framing).receives]
    assert sorted(received, key=_pair) == sorted(sent, key=_pair)


def _pair(channel: Channel) -> tuple[int, int]:
    return channel.source, channel.destination


def test_pieces_of_a_bucket_are_aligned_and_apart() -> None:
    for message in _messages(CASE, 4, Framing(3000, None)):
        end = 0
        for piece in message.pieces:
            assert piece.offset % ALIGNMENT == 0
            assert piece.offset >= end
            end = piece.offset + piece.nbytes
        assert end == message.nbytes


def test_only_large_pieces_are_messages_of_their_own() -> None:
    messages = _messages(CASE, 4, Framing(1 << 20, 1024))
    single = [message.pieces[0] for message in messages if len(message.pieces) == 1]
    together = [piece for message in messages if len(message.pieces) > 1 for piece in message.pieces]
    assert {piece.tensor.key for piece in single} >= {"embedding", "qkv", "proj", "fc1", "experts.fc1", "experts.fc2"}
    assert together
    assert all(piece.nbytes < 1024 for piece in together)


def test_a_piece_larger_than_a_bucket_is_cut_along_rows() -> None:
    whole = TensorSpec("w", (1000, 64), "bfloat16")
    shardings = [Sharding.from_ranks({rank: RankSharding.of([(whole, Box.whole(whole.shape))])}) for rank in (0, 1)]
    channel = make_schedule(plan_refit(*shardings), 1, Framing(10_000, 5_000)).receives[0]
    assert [message.pieces[0].box.extents[1] for message in channel.messages] == [64] * 13


def test_stacked_pieces_never_span_two_tensors() -> None:
    pieces = [piece for message in _messages(CASE, 4, Framing(1 << 20, None)) for piece in message.pieces]
    assert {piece.box.extents[0] for piece in pieces if piece.tensor.stacked} == {1}


def test_bucket_size_shares_the_staging() -> None:
    assert num_peers(CASE.plan) == 4
    assert bucket_bytes(CASE.plan, 1 << 20, 4, limit=1 << 30) == (1 << 20) // 16
    assert bucket_bytes(CASE.plan, 1 << 30, 4, limit=4096) == 4096
    with pytest.raises(UsageError, match=r"4000 bytes of staging leave 240 .*16 buckets.*--staging-mib to 0\.004"):
        bucket_bytes(CASE.plan, 4000, 4, limit=4096)


def test_pairs_share_the_staging_by_their_bytes() -> None:
    sizes = pair_buckets(CASE.plan, 1 << 20, 2, limit=1 << 30)
    moved: dict[tuple[int, int], int] = dict.fromkeys(sizes, 0)
    for transfer in CASE.plan.transfers():
        if (transfer.source, transfer.destination) in moved:
            moved[transfer.source, transfer.destination] += transfer.nbytes
    for rank in {rank for pair in sizes for rank in pair}:
        assert 2 * sum(size for pair, size in sizes.items() if rank in pair) <= 1 << 20
    most, least = max(moved, key=moved.__getitem__), min(moved, key=moved.__getitem__)
    assert sizes[most] >= sizes[least]
    assert set(pair_buckets(CASE.plan, 1 << 30, 2, limit=4096).values()) == {4096}


def test_a_rank_that_only_sends_or_only_receives_uses_all_its_staging_for_that() -> None:
    whole = TensorSpec("w", (1 << 20, 64), "bfloat16")
    shardings = [Sharding.from_ranks({rank: RankSharding.of([(whole, Box.whole(whole.shape))])}) for rank in (0, 1)]
    (size,) = pair_buckets(plan_refit(*shardings), 1 << 20, 2, limit=1 << 30).values()
    assert size == (1 << 20) // 2


def test_one_rank_of_kimi_k2_is_scheduled_whole() -> None:
    """60 MoE layers, 384 experts, EP8 -> EP4: 17,280 pieces arrive at a rank."""
    source, target = _expert_sharding(range(8), 60), _expert_sharding(range(8, 12), 60)
    plan = plan_refit(source, target)
    schedule = make_schedule(plan, 8, Framing(8 << 20, 32 << 20))
    assert sum(len(m.pieces) for c in schedule.receives for m in c.messages) >= 60 * 96 * 3


def _expert_sharding(ranks: range, num_layers: int) -> Sharding:
    """384 experts sharded over `ranks`, one ETP part of each: gate, up ([256, 7168]) and down ([7168, 256])."""
    per_rank = 384 // len(ranks)

    def tensor_sharding(shape: tuple[int, ...]) -> TensorSharding:
        boxes = (Box.whole(shape).narrow(0, i * per_rank, (i + 1) * per_rank) for i in range(len(ranks)))
        return TensorSharding(tuple(ReplicatedShard(box, (rank,)) for box, rank in zip(boxes, ranks, strict=True)))

    shapes = {"gate": (384, 256, 7168), "up": (384, 256, 7168), "down": (384, 7168, 256)}
    keys = {f"{layer}.{name}": shape for layer in range(num_layers) for name, shape in shapes.items()}
    by_key = {shape: tensor_sharding(shape) for shape in shapes.values()}
    return Sharding(
        tuple(ranks),
        {key: TensorSpec(key, shape, "bfloat16", stacked=True) for key, shape in keys.items()},
        {key: by_key[shape] for key, shape in keys.items()},
    )
