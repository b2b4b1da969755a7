"""This rank's weights as the messages of a refit use them: read at the source, written, read again to be passed on.

A copy that passes something on is ordered behind the copies that have written it, by the hooks that both have: each
copy that writes marks, in its `after`, that it has; each that reads what others wrote asks for these marks in its
`before`. On a GPU a mark is an event on the stream that has written, and the stream that reads waits for it. Streams of
several peers, and those of local copies, thus need no order but this one. Elsewhere the thread that copies does one
copy after another, and a mark is a check.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from refit.memory.weights import Hook, LocalWeights, Part, generations, refresh_all
from refit.transport.kept import KeptMessages
from refit.transport.messages import Message, Schedule
from refit.transport.overlaps import Overlaps


class LocalSides:
    """The weights of both sides on this rank, None of a side that it is not in, under one schedule."""

    def __init__(
        self,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        schedule: Schedule,
        window: int | None = None,
    ) -> None:
        """`window`: see `KeptMessages`."""
        self.source = source
        self.destination = destination
        self._schedule = schedule  # keeps the messages, and so their ids
        self.passes_on = any(message.stage > 0 for channel in schedule.sends for message in channel.messages)
        self.kept = KeptMessages(schedule, window)
        self.unbind()

    @property
    def generations(self) -> tuple[int, ...]:
        return generations(self.source, self.destination)

    @property
    def device(self) -> torch.device:
        memory = self.destination if self.destination is not None else self.source
        return torch.device("cpu") if memory is None else memory.device

    def refresh(self) -> None:
        refresh_all(self.source, self.destination)

    def unbind(self) -> None:
        """Forget all copies, which are about to be made again, for weights with new storage."""
        self._writers = Overlaps[_Writer]()
        self._all_writers: list[_Writer] = []
        self._read: dict[int, tuple[_Writer, ...]] = {}  # by the id of a message, as they are large to compare

    def begin(self) -> None:
        """A run begins: nothing has arrived."""
        self.kept.begin()
        for writer in self._all_writers:
            writer.is_done, writer.event = False, None

    def read_by(self, message: Message) -> LocalWeights:
        """The weights that `message`, which this rank sends, is read in."""
        memory = self.source if message.stage == 0 else self.destination
        assert memory is not None
        return memory

    def written_by(self, message: Message) -> LocalWeights:
        """The weights that `message`, which this rank receives, is written into."""
        assert self.destination is not None
        return self.destination

    def before_reading(self, message: Message) -> Hook | None:
        """What to call before a copy reads `message` in a run."""
        wanted = self.read_by(message).before_reading(message.parts)
        if message.stage == 0:
            return wanted

        def hook() -> None:
            if wanted is not None:
                wanted()
            for writer in self._writers_of(message):
                writer.wait(self.device)

        return hook

    def after_writing(self, parts: Iterable[Part]) -> Hook | None:
        """What to call, once in a run, after a copy has written these parts of the destination."""
        assert self.destination is not None
        if not self.passes_on:
            return self.destination.after_writing(parts)
        parts = list(parts)
        wanted, writer = self.destination.after_writing(parts), _Writer()
        self._all_writers.append(writer)
        for key, box in parts:
            self._writers.add(key, box, writer)

        def hook() -> None:
            if wanted is not None:
                wanted()
            writer.mark(self.device)

        return hook

    def is_there(self, message: Message) -> bool:
        """Whether all copies that write what `message` reads have run. On a GPU: have been enqueued."""
        return message.stage == 0 or all(writer.is_done for writer in self._writers_of(message))

    def _writers_of(self, message: Message) -> tuple[_Writer, ...]:
        """Looked up when first needed: by then all copies have been bound."""
        if id(message) not in self._read:
            found = {id(writer): writer for key, box in message.parts for writer in self._writers.find(key, box)}
            assert found, "every part that is passed on has been delivered, as the plan's proof shows"
            self._read[id(message)] = tuple(found.values())
        return self._read[id(message)]


@dataclass(slots=True)
class _Writer:
    """A copy into the destination's weights. `event` is behind it on its stream, where it has one."""

    is_done: bool = False
    event: torch.cuda.Event | None = None

    def mark(self, device: torch.device) -> None:
        self.is_done = True
        self.event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self, device: torch.device) -> None:
        assert self.is_done, "messages go in the order of their steps, or once `is_there`"
        if self.event is not None:
            torch.cuda.current_stream(device).wait_event(self.event)
