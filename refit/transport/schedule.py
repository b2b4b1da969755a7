"""When messages go: the step of each, a pure function of the plan, so that both ends of a pair derive the same.

In stage 0 message n of every pair has step n. A later stage passes on what has arrived. Its messages take what arrives
first before the rest, and each has a step LAG or more behind the last message that it is made of. Source rank 0 sends
four messages to rank 1, which passes them on to rank 2:

    step            0    1    2    3    4    5
    0 to 1         m0   m1   m2   m3                 stage 0
    1 to 2                   m0   m1   m2   m3       stage 1

So k ranks in a row get n messages in n + (k - 1) LAG steps, not k n, and while rank 1 sends m0 it receives m2.

Messages that an encoding packs are passed on as they have arrived, byte for byte. So the messages that bring something
are cut where their parts have different ways onward (`onward`). They have to be kept meanwhile (`kept`), and a rank is
to keep one per link. So those that send it such messages take turns, and each stage has steps of its own: those of
stage s are n x (number of stages) + s for numbers n, of which the module's picture shows those of one sender. Ranks 0
and 3 send to rank 1, which passes all on to rank 2, in two stages:

    n               0    1    2    3    4    5
    0 to 1         m0        m1                      steps 0, 4
    3 to 1              k0        k1                 steps 2, 6
    1 to 2                   m0   k0   m1   k1       steps 5, 7, 9, 11

Without turns m0 and k0 would arrive in one step, and so on, and half of all would be kept in the end.

Why no rank waits for ever. What a message waits for has a smaller (refit, step): messages that its pair has exchanged
before; messages whose slots it uses; if it passes something on, the messages that brought it. The stage is in the step:
of two messages of which the later reads what the earlier has written, the earlier has the lower stage and the smaller
step. Copies within a rank wait for nobody. So of all messages that are not done, one with the smallest (refit, step)
waits for none of the others, and can go. Both executors let it: see there what else they wait for.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refit.plan.box import Box
from refit.plan.estimate import LAG
from refit.plan.plan import RefitPlan, Transfer
from refit.plan.sharding import TensorSpec
from refit.transport.messages import Channel, Framing, Message, Schedule, Totals, messages_of, packed_messages
from refit.transport.onward import Hops, Onward
from refit.transport.overlaps import Overlaps

NOWHERE = -1
"""In place of a step, for what arrives from no other rank: it is there from the beginning."""


NOTHING_ARRIVES = NOWHERE - LAG
"""In place of the last step in which a message arrives, for one of which nothing does: it bounds nothing."""


def make_schedule(plan: RefitPlan, rank: int, framing: Framing) -> Schedule:
    """The schedule of `rank` under `plan`.

    Where stages follow one another, it derives the messages of the ranks upstream of this one too, back to the source.
    """
    part, order = plan.for_rank(rank), _Order(plan, framing)
    sends, receives = order.channels(part.sends), order.channels(part.receives)
    return Schedule(rank, sends, receives, part.local, part.zeros, Totals.of(part))


@dataclass(frozen=True, slots=True)
class _Turns:
    """The numbers n with n % `num` = `turn` % `num`, one in `every` of them."""

    turn: int
    num: int
    every: int

    def has(self, number: int) -> bool:
        return number % self.num == self.turn % self.num and number // self.num % self.every == 0


class _Order:
    """Cuts transfers into messages, and gives each its step."""

    def __init__(self, plan: RefitPlan, framing: Framing) -> None:
        self._plan = plan
        self._framing = framing
        self._known: dict[tuple[int, int], Overlaps[int]] = {}
        self._brought: dict[tuple[int, int], list[tuple[int, Message]]] = {}
        self._onward = Onward(plan)
        self._sends_to: dict[int, list[tuple[int, int]]] = {}
        self._period: dict[tuple[int, int], int] = {}

    def channels(self, transfers: Iterable[Transfer]) -> tuple[Channel, ...]:
        """The channels of `transfers`, which are in plan order: of a pair all, or all before some stage."""
        by_pair: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        for transfer in transfers:
            by_pair[transfer.source, transfer.destination].append(transfer)
        return tuple(Channel(*pair, self._messages(by_pair[pair], *pair)) for pair in sorted(by_pair))

    def _messages(self, transfers: Sequence[Transfer], source: int, destination: int) -> tuple[Message, ...]:
        """The messages of one pair, by step. No two have the same, so that slots and counters know one order."""
        framing = self._framing.of_pair(source, destination)
        if framing.max_bytes is not None and self._plan.num_stages > 1:
            return self._packed_messages(transfers, source, destination, framing)
        found: dict[int, Message] = {}
        for stage, group in itertools.groupby(transfers, lambda transfer: transfer.stage):
            step = -1
            for message, arrives in self._copied(list(group), stage, source, destination, framing):
                step = max(step + 1, arrives + LAG)
                while step in found:  # a message of an earlier stage
                    step += 1
                found[step] = message.at(stage, step)
        return tuple(found[step] for step in sorted(found))

    def _packed_messages(
        self, transfers: Sequence[Transfer], source: int, destination: int, framing: Framing
    ) -> tuple[Message, ...]:
        """Those that an encoding packs: what is passed on LAG behind its arrival, the pair's own between them."""
        num_stages, found = self._plan.num_stages, list[Message]()
        for stage, group in itertools.groupby(transfers, lambda transfer: transfer.stage):
            turns = self._turns(source, destination, stage) if stage < num_stages - 1 else None
            taken: set[int] = set()
            messages = list(self._packed(list(group), stage, source, destination, framing))
            passed_on = [each for each in messages if each.passes_on is not None]
            own = [each for each in messages if each.passes_on is None]
            own.sort(key=lambda each: not _goes_on(each, destination, stage))
            for kind in (passed_on, own):
                last = -1
                for message in kind:
                    earliest = 0 if message.passes_on is None else message.passes_on[1] // num_stages + LAG
                    last = max(last + 1, earliest)
                    while last in taken or (turns and _goes_on(message, destination, stage) and not turns.has(last)):
                        last += 1
                    taken.add(last)
                    found.append(message.at(stage, last * num_stages + stage))
        return tuple(sorted(found, key=lambda message: message.step))

    def _turns(self, source: int, destination: int, stage: int) -> _Turns:
        """When `source` sends `destination` in `stage` what that one passes on.

        It has a turn among all that send so to `destination`, in any stage but the last, which passes nothing on. One
        turn in `every`: as often as those to which `destination` passes it on have a turn for that.
        """
        senders = self._senders(destination)
        # Several destinations of the same sources begin with different ones.
        return _Turns(senders.index((stage, source)) + destination, len(senders), self._every(destination, stage))

    def _every(self, rank: int, stage: int) -> int:
        if (rank, stage) not in self._period:
            plan = self._plan
            sends = plan.is_wire & (plan.source == rank) & (plan.stage > stage) & (plan.stage < plan.num_stages - 1)
            onward = set(zip(plan.destination[sends].tolist(), plan.stage[sends].tolist(), strict=True))
            periods = (len(self._senders(peer)) * self._every(peer, later) for peer, later in onward)
            self._period[rank, stage] = max(periods, default=1)
        return self._period[rank, stage]

    def _senders(self, rank: int) -> list[tuple[int, int]]:
        """The stages but the last, and in each the ranks that send to `rank`."""
        if rank not in self._sends_to:
            plan = self._plan
            sends = plan.is_wire & (plan.destination == rank) & (plan.stage < plan.num_stages - 1)
            found = set(zip(plan.stage[sends].tolist(), plan.source[sends].tolist(), strict=True))
            self._sends_to[rank] = sorted(found)
        return self._sends_to[rank]

    def _copied(
        self, transfers: Sequence[Transfer], stage: int, source: int, destination: int, framing: Framing
    ) -> Iterator[tuple[Message, int]]:
        """Messages of weights of one stage of a pair, each with the step in which the last of it arrives."""
        arrived = self._arrived(source, stage) if stage else Overlaps[int]()
        for message in messages_of(_by_arrival(transfers, arrived) if stage else transfers, framing):
            yield message, _last(arrived, message) if stage else NOTHING_ARRIVES

    def _packed(
        self, transfers: Sequence[Transfer], stage: int, source: int, destination: int, framing: Framing
    ) -> Iterator[Message]:
        """Messages of one stage of a pair that an encoding packs: what the source itself packs, then what it passes on,
        as it arrives."""
        hop = (stage, source, destination)
        passed_on = [(peer, message) for peer, message in self._received(source, stage) if hop in message.hops]
        rest = Overlaps[Box]()
        for _, message in passed_on:
            for key, box in message.parts:
                rest.add(key, box, box)
        yield from packed_messages(self._own(transfers, rest, destination, stage), framing)
        for peer, message in sorted(passed_on, key=lambda each: (each[1].step, each[0])):
            yield replace(message, passes_on=(peer, message.step))

    def _own(
        self, transfers: Iterable[Transfer], passed_on: Overlaps[Box], destination: int, stage: int
    ) -> Iterator[tuple[TensorSpec, Box, Hops]]:
        """What of `transfers` is not passed on, in boxes with one way onward each."""
        for transfer in transfers:
            key = transfer.tensor.key
            for whole in transfer.tensor.memory_boxes(transfer.box):
                boxes = [whole]
                for other in passed_on.find(key, whole):
                    boxes = [left for box in boxes for left in box.subtract(other)]
                for box in boxes:
                    for part, hops in self._onward.parts(key, box, destination, stage):
                        yield transfer.tensor, part, hops

    def _received(self, rank: int, stage: int) -> list[tuple[int, Message]]:
        """What other ranks send `rank` before `stage`, with the ranks that send it."""
        if (rank, stage) not in self._brought:
            plan = self._plan
            routes = plan.is_wire & (plan.destination == rank) & (plan.stage < stage)
            channels = self.channels(plan.transfers(np.flatnonzero(routes)))
            found = [(channel.source, message) for channel in channels for message in channel.messages]
            self._brought[rank, stage] = found
        return self._brought[rank, stage]

    def _arrived(self, rank: int, stage: int) -> Overlaps[int]:
        """The steps in which `rank` gets what other ranks send it before `stage`, by the boxes that arrive."""
        if (rank, stage) not in self._known:
            found = Overlaps[int]()
            for _, message in self._received(rank, stage):
                for key, box in message.parts:
                    found.add(key, box, message.step)
            self._known[rank, stage] = found
        return self._known[rank, stage]


def _goes_on(message: Message, rank: int, stage: int) -> bool:
    """Whether `rank`, which gets `message` in `stage`, passes it on."""
    return any(sender == rank and later > stage for later, sender, _ in message.hops)


def _by_arrival(transfers: Iterable[Transfer], arrived: Overlaps[int]) -> Iterator[Transfer]:
    """`transfers`, cut as tensors lie in memory, those first that can be passed on first.

    Several ranks send to a relay at the same time, such as one of each pipeline stage. In plan order it would pass on
    all layers of the first one before any of the others'.
    """
    parts = (replace(transfer, box=box) for transfer in transfers for box in transfer.tensor.memory_boxes(transfer.box))
    yield from sorted(parts, key=lambda part: max(arrived.find(part.tensor.key, part.box), default=NOWHERE))


def _last(arrived: Overlaps[int], message: Message) -> int:
    """The step with which the last of `message` has arrived."""
    steps = (step for key, box in message.parts for step in arrived.find(key, box))
    return max(steps, default=NOTHING_ARRIVES)
