"""Messages that an encoding has packed, kept from their arrival until they have been passed on.

A message is kept in memory of its own, not in the slot in which it arrived: its sender may write that again, whether
this rank has been able to pass the message on or not, so that nobody waits for a later step (`schedule`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refit.transport.messages import Message, Schedule

Number = tuple[int, int]
"""Of a message to this rank: the rank that sends it, and its step."""


@dataclass(slots=True)
class KeptMessage:
    """The bytes of one message while a run passes it on: `num_left` times still, of `num_sends`."""

    kept: KeptMessages
    num_sends: int
    payload: torch.Tensor | None = None
    length: torch.Tensor | None = None
    num_left: int = 0

    def put(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """Keep a copy of the first `length` bytes; on a GPU of all, as nobody knows `length` there without waiting."""
        self.payload = (payload if length.is_cuda else payload[: int(length)]).clone()
        self.length, self.num_left = length.clone(), self.num_sends
        self.kept.add(self.payload.numel())

    def take(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """Write them into the beginning of `payload`, and their number into `length`."""
        assert self.payload is not None, "it has arrived: its hook was waited for"
        assert self.length is not None
        payload[: self.payload.numel()].copy_(self.payload)
        length.copy_(self.length)
        if self.payload.is_cuda:  # on another stream than that which has allocated it
            self.payload.record_stream(torch.cuda.current_stream(self.payload.device))
        self.num_left -= 1
        if not self.num_left:
            self.drop()

    def drop(self) -> None:
        if self.payload is None:
            return
        self.kept.add(-self.payload.numel())
        self.payload = self.length = None


class KeptMessages:
    """Those of one rank under one schedule. `most_bytes` is the most that it has kept at a time."""

    def __init__(self, schedule: Schedule) -> None:
        self._bytes = self.most_bytes = 0
        sent = (message for channel in schedule.sends for message in channel.messages)
        numbers = [message.passes_on for message in sent if message.passes_on is not None]
        self._messages = {number: KeptMessage(self, numbers.count(number)) for number in set(numbers)}

    def begin(self) -> None:
        """A run begins. One that failed may have left messages."""
        for message in self._messages.values():
            message.drop()

    def received(self, message: Message, peer: int) -> KeptMessage | None:
        """Where `message` from `peer` is to be kept; None where it is not passed on."""
        return self._messages.get((peer, message.step))

    def sent(self, message: Message) -> KeptMessage | None:
        """What `message` passes on; None where this rank packs it."""
        return None if message.passes_on is None else self._messages[message.passes_on]

    def add(self, nbytes: int) -> None:
        self._bytes += nbytes
        self.most_bytes = max(self.most_bytes, self._bytes)
