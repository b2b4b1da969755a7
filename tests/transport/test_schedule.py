"""The order of messages of several stages: the same at both ends, behind what they are made of, and soon after it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import first_holders
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.transport.messages import Channel, Framing, Message
from refit.transport.overlaps import Overlaps
from refit.transport.schedule import LAG, make_schedule
from tests.plan.strategies import sides, staged
from tests.transport.synthetic import Case

CASE = Case(Layout(2, 2, 1, 1, 2), Layout(1, 2, 1, 1, 6))


def channels(plan: RefitPlan, framing: Framing) -> dict[tuple[int, int], Channel]:
    """All channels of the plan, which both ends must derive alike."""
    schedules = [make_schedule(plan, rank, framing) for rank in plan.ranks]
    sent = {(c.source, c.destination): c for schedule in schedules for c in schedule.sends}
    assert {(c.source, c.destination): c for schedule in schedules for c in schedule.receives} == sent
    return sent


def check(plan: RefitPlan, framing: Framing) -> None:
    found = channels(plan, framing)
    for (source, _), channel in found.items():
        steps = [message.step for message in channel.messages]
        assert all(before < after for before, after in itertools.pairwise(steps))
        for message in (message for message in channel.messages if message.stage > 0):
            arrives = [
                earlier
                for (_, destination), incoming in found.items()
                for earlier in incoming.messages
                if destination == source and share(earlier, message)
            ]
            assert all(earlier.stage < message.stage for earlier in arrives)
            assert all(earlier.step + LAG <= message.step for earlier in arrives)


def share(one: Message, other: Message) -> bool:
    return any(
        key == other_key and box.intersect(other_box) is not None
        for key, box in one.parts
        for other_key, other_box in other.parts
    )


@given(sides(), st.integers(2, 4), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_a_message_goes_after_what_it_is_made_of(
    pair: tuple[Sharding, Sharding], num_stages: int, random: Random
) -> None:
    check(staged(*pair, num_stages, random), Framing(256, 64))


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stacked_and_gated_tensors_too(num_stages: int) -> None:
    check(staged(*CASE.plan.shardings, num_stages, Random(3)), Framing(4096, 2048))


def test_one_stage_has_a_step_for_each_message() -> None:
    for channel in channels(CASE.plan, Framing(4096, 2048)).values():
        assert [message.step for message in channel.messages] == list(range(len(channel.messages)))


def tensors(number: int) -> list[tuple[TensorSpec, Box]]:
    specs = (TensorSpec(f"layer{layer}", (16, 8), "bfloat16") for layer in range(number))
    return [(spec, Box.whole(spec.shape)) for spec in specs]


def on(parts: dict[int, list[tuple[TensorSpec, Box]]]) -> Sharding:
    return Sharding.from_ranks({rank: RankSharding.of(held) for rank, held in parts.items()})


def test_a_chain_takes_little_longer_than_one_of_its_ranks() -> None:
    """Four ranks in a row, ten messages each: m0 to m9 of a stage follow those of the stage before, LAG behind."""
    whole = tensors(10)
    source, ends = on({0: whole}), [on(dict.fromkeys(range(1, last + 1), whole)) for last in range(1, 5)]
    plan = plan_refit(source, ends[-1], via=ends[:-1])
    # The planner lets all that have it by then share the sending. Rank k is the only one to send in stage k here.
    found = channels(replace(plan, source=plan.stage), Framing(256, None))
    assert sorted(found) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for (source_rank, _), channel in found.items():
        assert [message.step for message in channel.messages] == [source_rank * LAG + n for n in range(10)]


def test_what_several_ranks_send_at_a_time_is_passed_on_as_it_arrives() -> None:
    """Two pipeline stages, four layers each. The relay gets layers 0 and 4 first, so it passes them on first."""
    whole = tensors(8)
    source, destination = on({0: whole[:4], 1: whole[4:]}), on({2: whole, 3: whole})
    plan = plan_refit(source, destination, via=[first_holders(source, destination, lambda shard: [2])])
    passed_on = channels(plan, Framing(256, None))[2, 3].messages
    keys = [key for message in passed_on for key, _ in message.parts]
    assert keys == [f"layer{layer}" for layer in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert [message.step for message in passed_on] == [LAG + n for n in range(8)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 5), st.integers(1, 4)), max_size=12))
def test_overlaps_are_all_found(numbers: list[tuple[int, int, int, int]]) -> None:
    boxes = [Box((a, c), (b, d)) for a, b, c, d in numbers]
    filed = Overlaps[int]()
    for number, box in enumerate(boxes):
        filed.add("w", box, number)
    for box in (*boxes, Box((2, 2), (1, 1)), Box((0, 0), (9, 9))):
        wanted = [number for number, other in enumerate(boxes) if other.intersect(box)]
        assert sorted(filed.find("w", box)) == wanted
        assert list(filed.find("other", box)) == []
