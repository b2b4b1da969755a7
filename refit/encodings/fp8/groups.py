"""Groups of matrices that are quantised together: on a stream of their own, or by the calling thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from refit.config.quantisation import Quantisation
from refit.encodings.fp8.batch import QuantiseBatch
from refit.encodings.fp8.matrix import Matrix
from refit.errors import RefitError
from refit.memory.phases import counted_apart
from refit.memory.streams import new_stream
from refit.plan.box import Box


@dataclass(frozen=True, slots=True)
class Gather:
    """Weights of several views whose seams cut blocks, to be copied together before they are quantised."""

    whole: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    views: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A matrix to quantise: `box` of the tensor `matrix.key`, in dims but the last two a single index. After `gather`,
    if there is one."""

    box: Box
    matrix: Matrix
    gather: Gather | None = None


@dataclass(frozen=True, slots=True)
class _Span:
    """Events around one group, on the stream that quantises."""

    begun: torch.cuda.Event
    ended: torch.cuda.Event

    @property
    def seconds(self) -> float:
        milliseconds: float = self.begun.elapsed_time(self.ended)
        return milliseconds / 1e3


class Groups:
    """Quantises group by group, in the order of the calls. `phase` is the name under which its time is counted."""

    def __init__(self, phase: str, device: torch.device, quantisation: Quantisation) -> None:
        self._phase = phase
        self._device = device
        self._quantisation = quantisation
        # Of the lowest priority: copies, which the wire waits for, come before the next group.
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._keys: list[str] = []
        self._flags = torch.zeros(0, dtype=torch.int32, device=device)
        self._has_run: set[int] = set()
        self._replaced: list[tuple[list[str], torch.Tensor]] = []
        self.load(())

    def load(self, groups: Sequence[Sequence[Job]]) -> None:
        """Run these groups from now on, instead of others.

        Once a run has begun to quantise: the same jobs in the same groups, of which some that have not run may have
        other memory.
        """
        if self._has_run:
            if self._stream is not None:
                self._stream.synchronize()  # their tables are in use
            self._replaced.append((self._keys, self._flags))
        self._keys = [job.matrix.key for group in groups for job in group]
        self._flags = torch.zeros(len(self._keys), dtype=torch.int32, device=self._device)
        self._gathers = [[job.gather for job in group if job.gather is not None] for group in groups]
        ends = list(itertools.accumulate(map(len, groups), initial=0))
        self._batches = [
            QuantiseBatch([job.matrix for job in group], self._quantisation, self._flags[begin:end])
            for group, (begin, end) in zip(groups, itertools.pairwise(ends), strict=True)
        ]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def begin(self) -> None:
        """A run begins, whose weights the current stream may still be writing."""
        self._spans: dict[int, _Span] = {}
        self._has_run.clear()
        self._replaced.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def require(self, number: int) -> None:
        """Quantise group `number` unless this run has. On a GPU the current stream waits for it."""
        if number not in self._has_run:
            self.run(number)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._spans[number].ended)

    def run(self, number: int, after: Iterable[torch.cuda.Event] = ()) -> None:
        """Quantise group `number`. On a GPU: enqueue, behind the events `after`."""
        self._has_run.add(number)
        with counted_apart(self._phase):
            if self._stream is None:
                self._run(number)
                return
            for event in after:
                self._stream.wait_event(event)
            with torch.cuda.stream(self._stream):
                begun = _record(self._stream)
                self._run(number)
                self._spans[number] = _Span(begun, _record(self._stream))

    def mark(self) -> torch.cuda.Event | None:
        """On a GPU, an event behind the work of the current stream."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        """Wait for all groups. Raises RefitError, naming the tensors, where any run has met NaN or infinity."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        # Reading the flags waits for the device.
        found = [
            names[number]
            for names, flags in (*self._replaced, (self._keys, self._flags))
            for number in torch.nonzero(flags).flatten().tolist()
        ]
        if found:
            keys = sorted(set(found))
            raise RefitError(
                f"{len(keys)} tensors have NaN or infinity, which FP8 codes cannot hold: {', '.join(keys[:3])}: "
                "check the source's weights"
            )

    @property
    def busy_s(self) -> float:
        """Seconds of a GPU's work in the run that has ended; 0 elsewhere, where the phase has them."""
        return sum(span.seconds for span in self._spans.values())

    @property
    def first_s(self) -> float:
        """Those of the first group, for which nothing can move; 0 without one."""
        return next((span.seconds for span in self._spans.values()), 0.0)

    def _run(self, number: int) -> None:
        for gather in self._gathers[number]:
            torch._foreach_copy_(gather.parts, gather.views)
        self._batches[number].run()


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
