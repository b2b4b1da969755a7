"""Messages that an encoding packs, and that are passed on as they are: whole, in order, and over every transport."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.relay import Relay
from refit.plan import relay
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import Sharding
from refit.transport.kept import KeptMessages, KeptSend
from refit.transport.messages import Framing
from refit.transport.schedule import LAG, make_schedule
from tests.plan.strategies import sides, staged
from tests.ranks.pool import RankPool
from tests.seams import nonzero_rows
from tests.transport import test_packed
from tests.transport.synthetic import Case
from tests.transport.test_relay import CASES
from tests.transport.test_schedule import channels, share
from tests.transport.test_transports import EXECUTORS

pytestmark = pytest.mark.no_megatron


def check(plan: RefitPlan, framing: Framing) -> int:
    """How many messages are passed on. What arrives by the network is never packed again, and goes on whole."""
    found, num_passed_on = channels(plan, framing), 0
    for (source, destination), channel in found.items():
        arrived = {
            (peer, message.step): message
            for (peer, receiver), incoming in found.items()
            if receiver == source
            for message in incoming.messages
        }
        for message in channel.messages:
            assert message.max_bytes is not None
            assert message.buffer_bytes <= framing.bucket_bytes
            if message.passes_on is None:
                assert not any(share(earlier, message) for earlier in arrived.values() if earlier.stage < message.stage)
                continue
            origin = arrived[message.passes_on]
            assert (origin.pieces, origin.max_bytes, origin.hops) == (message.pieces, message.max_bytes, message.hops)
            assert (message.stage, source, destination) in origin.hops
            assert origin.step + LAG <= message.step
            num_passed_on += 1
        moved = sum(message.nbytes for message in channel.messages)
        routes = plan.is_wire & (plan.source == source) & (plan.destination == destination)
        assert moved == plan.nbytes[routes].sum()
    assert {pair for pair, channel in found.items() if channel.messages} == set(found)
    return num_passed_on


@given(sides(), st.integers(2, 4), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_what_has_arrived_goes_on_as_it_is(pair: tuple[Sharding, Sharding], num_stages: int, random: Random) -> None:
    check(staged(*pair, num_stages, random), Framing(512, 64, max_bytes=nonzero_rows.max_bytes))


@given(sides(), st.integers(2, 4), st.integers(2, 4), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_unpacking_waits_for_smaller_steps_only(
    pair: tuple[Sharding, Sharding], num_stages: int, window: int, random: Random
) -> None:
    """What the argument of `kept` needs: a deadline behind a message's arrival, before all that waits for it."""
    plan = staged(*pair, num_stages, random)
    framing = Framing(512, 64, max_bytes=nonzero_rows.max_bytes)
    for rank in plan.ranks:
        schedule = make_schedule(plan, rank, framing)
        kept = KeptMessages(schedule, window)
        for channel in schedule.receives:
            deadlines = []
            for message, reuses in itertools.zip_longest(channel.messages, channel.messages[window:]):
                deadline = kept.deadlines.get((channel.source, message.step))
                goes_on = kept.received(message, channel.source)
                assert (deadline is None) == (goes_on is None)
                if deadline is None or goes_on is None:
                    continue
                deadlines.append(deadline)
                assert message.step < deadline <= min(step for _, step in goes_on.sends)
                assert reuses is None or deadline <= reuses.step
            assert deadlines == sorted(deadlines), "messages of a pair are unpacked in order"


def relayed(case: str, name: Relay) -> RefitPlan:
    layouts, ranks_per_node = CASES[case]
    source, *_, destination = layouts.plan.shardings
    with mock.patch.object(relay, "MIN_PART_BYTES", 256):
        via = relay_stages(source, destination, name, ranks_per_node)
    return plan_refit(source, destination, ranks_per_node=ranks_per_node, via=via)


@pytest.mark.parametrize("name", [Relay.NODE, Relay.ENGINE])
@pytest.mark.parametrize("case", CASES)
def test_models_are_passed_on(case: str, name: Relay) -> None:
    assert check(relayed(case, name), Framing(8192, 64, max_bytes=nonzero_rows.max_bytes)) > 8


class Relayed(Case):
    """A case with a relay's plan."""

    name = Relay.NODE

    @property
    def plan(self) -> RefitPlan:
        case = next(case for case, (layouts, _) in CASES.items() if layouts.destination == self.destination)
        return relayed(case, self.name)


class ByEngine(Relayed):
    name = Relay.ENGINE


def refits(rank: int, case: Case, way: tuple[str, str]) -> Any:
    """As those of `test_packed`, how often this rank has passed a message on, and the most that it kept for a link."""
    take, add, num_taken, most = KeptSend.take, KeptMessages.add, 0, 0

    def counted(self: KeptSend, *args: Any) -> None:
        nonlocal num_taken
        num_taken += 1
        take(self, *args)

    def added(self: KeptMessages, *args: Any) -> None:
        nonlocal most
        add(self, *args)
        most = max(most, self.most_on_a_link)

    with (
        mock.patch.object(KeptSend, "take", counted),
        mock.patch.object(KeptMessages, "add", added),
        mock.patch.object(test_packed, "STAGING_BYTES", 64 << 10),
    ):
        wrong, report, _ = test_packed.refits(rank, case, way)
    return wrong, report, num_taken, most


@pytest.mark.parametrize(
    ("case", "kind", "way"),
    [
        (case, kind, way)
        for case in CASES
        for kind in (Relayed, ByEngine)
        for way in EXECUTORS
        # Over Gloo, three stages of many short messages take many seconds: one case of them.
        if (kind, way[0]) != (ByEngine, "gloo") or case == "collocated"
    ],
    ids=str,
)
def test_every_byte_arrives(ranks: RankPool, case: str, kind: type[Relayed], way: tuple[str, str]) -> None:
    layouts = CASES[case][0]
    relayed_case = kind(layouts.source, layouts.destination, hidden=layouts.hidden)
    answers = ranks.run(refits, relayed_case, way)
    assert [wrong for wrong, *_ in answers] == [[]] * len(answers)
    reports = [report for _, report, *_ in answers]
    assert sum(each.wire_bytes_sent for each in reports) == sum(each.wire_bytes_received for each in reports)
    assert sum(num_taken for *_, num_taken, _ in answers) > 0
    # In three stages, a link may be busy with what has arrived in another one.
    assert 0 < max(most for *_, most in answers) < relayed_case.plan.num_stages, answers
