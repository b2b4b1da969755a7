"""Messages that an encoding has packed, kept from their arrival until they have been passed on: one per link.

A message is kept in memory of its own, not in the slot in which it arrived: its sender may write that again, so that
nobody waits for a later step (`schedule`). Steps are such that a rank gets one message at a time that it has to pass
on, each as long before it goes on as the others: a message is unpacked, and so kept, once those before it have gone.
The two-sided executor unpacks what is passed on when that is due, the one-sided one once there `has_room`.

Nor does this make anybody wait for a later step. Unpacking message n of a pair waits for sends to the ranks that get it
next, of steps below its deadline: the least of the steps in which n and those behind it in its pair go on, and of the
step of the message that gets its slot. What waits for this unpacking has that step or a later one.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from refit.transport.messages import Channel, Message, Schedule

Number = tuple[int, int]
"""Of a message to this rank: the rank that sends it, and its step."""

Send = tuple[int, int]
"""Of a message from this rank: the rank that gets it, and its step."""


@dataclass(slots=True)
class KeptMessage:
    """The bytes of one message while a run passes it on: over `left` still, of `sends`."""

    kept: KeptMessages
    sends: frozenset[Send]
    payload: torch.Tensor | None = None
    length: torch.Tensor | None = None
    left: set[Send] = field(default_factory=set)

    def put(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """Keep a copy of the first `length` bytes; on a GPU of all, as nobody knows `length` there without waiting."""
        self.payload = (payload if length.is_cuda else payload[: int(length)]).clone()
        self.length, self.left = length.clone(), set(self.sends)
        self.kept.add(self, self.payload.numel())

    def take(self, payload: torch.Tensor, length: torch.Tensor, send: Send) -> None:
        """Write them into the beginning of `payload`, and their number into `length`: the message of `send`."""
        assert self.payload is not None, "it has arrived: its hook was waited for"
        assert self.length is not None
        payload[: self.payload.numel()].copy_(self.payload)
        length.copy_(self.length)
        if self.payload.is_cuda:  # on another stream than that which has allocated it
            self.payload.record_stream(torch.cuda.current_stream(self.payload.device))
        self.left.remove(send)
        if not self.left:
            self.drop()

    def drop(self) -> None:
        if self.payload is None:
            return
        self.kept.remove(self, self.payload.numel())
        self.payload = self.length = None
        self.left.clear()


@dataclass(frozen=True, slots=True)
class KeptSend:
    """What one message passes on."""

    message: KeptMessage
    send: Send

    def take(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """See `KeptMessage.take`."""
        self.message.take(payload, length, self.send)


class KeptMessages:
    """Those of one rank under one schedule.

    `most_bytes` is the most that it has kept at a time, `most_on_a_link` the most messages to one rank. `deadlines` are
    the steps that the module's docstring speaks of.
    """

    def __init__(self, schedule: Schedule, window: int | None = None) -> None:
        """Message n of a pair gets the slot of message n - `window`."""
        self._bytes = self.most_bytes = self.most_on_a_link = 0
        self._open: list[KeptMessage] = []
        sends: dict[Number, set[Send]] = {}
        for channel in schedule.sends:
            for message in channel.messages:
                if message.passes_on is not None:
                    sends.setdefault(message.passes_on, set()).add((channel.destination, message.step))
        self._messages = {number: KeptMessage(self, frozenset(each)) for number, each in sends.items()}
        steps: dict[int, list[int]] = defaultdict(list)
        for peer, step in itertools.chain.from_iterable(sends.values()):
            steps[peer].append(step)
        self._steps = {peer: sorted(each) for peer, each in steps.items()}
        self._num_sent: Counter[int] = Counter()
        self.deadlines: dict[Number, int] = {}
        for channel in schedule.receives:
            self.deadlines |= self._deadlines_of(channel, window or len(channel.messages))

    def _deadlines_of(self, channel: Channel, window: int) -> dict[Number, int]:
        found: dict[Number, int] = {}
        messages, least = channel.messages, None
        for place in reversed(range(len(messages))):
            number = channel.source, messages[place].step
            if number not in self._messages:
                continue
            first = min(step for _, step in self._messages[number].sends)
            least = first if least is None else min(least, first)
            found[number] = least if place + window >= len(messages) else min(least, messages[place + window].step)
        return found

    def begin(self) -> None:
        """A run begins. One that failed may have left messages."""
        self._num_sent.clear()
        for message in self._messages.values():
            message.drop()

    def has_room(self, message: Message, peer: int) -> bool:
        """Whether `message` from `peer` may be unpacked: what goes before it to the same ranks has gone."""
        number = peer, message.step
        if number not in self.deadlines:
            return True
        deadline = self.deadlines[number]
        links = {link for link, _ in self._messages[number].sends}
        return all(self._num_sent[link] >= bisect_left(self._steps[link], deadline) for link in links)

    def received(self, message: Message, peer: int) -> KeptMessage | None:
        """Where `message` from `peer` is to be kept; None where it is not passed on."""
        return self._messages.get((peer, message.step))

    def sent(self, message: Message, peer: int) -> KeptSend | None:
        """What `message` to `peer` passes on; None where this rank packs it."""
        if message.passes_on is None:
            return None
        return KeptSend(self._messages[message.passes_on], (peer, message.step))

    def went(self, message: Message, peer: int) -> None:
        """`message` to `peer` has gone. On a GPU: has been enqueued, which is all that enqueueing another waits for."""
        if message.passes_on is not None:
            self._num_sent[peer] += 1

    def add(self, message: KeptMessage, nbytes: int) -> None:
        self._open.append(message)
        self._bytes += nbytes
        self.most_bytes = max(self.most_bytes, self._bytes)
        links = Counter(peer for kept in self._open for peer, _ in kept.left)
        self.most_on_a_link = max(self.most_on_a_link, *links.values())

    def remove(self, message: KeptMessage, nbytes: int) -> None:
        self._open = [kept for kept in self._open if kept is not message]
        self._bytes -= nbytes
