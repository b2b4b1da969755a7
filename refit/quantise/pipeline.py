"""Quantising beside the transfer: weights are quantised in groups, each when copies need it or have completed it.

A transport copies messages and batches of local copies. `OnDemand` quantises, before a copy, what that copy is the
first to read: while the first messages are on the wire, the next ones are quantised. `OnArrival` quantises, after a
copy, the matrices that it has completed. So groups follow the transport's messages, and every pair of ranks has work
from the first message on. A rank groups its own matrices; no rank needs to know the groups of another.

On a GPU either has a stream of its own, and events order it with the streams that copy. Elsewhere the thread that
copies quantises, between its messages.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from refit.config.quantisation import Quantisation
from refit.errors import RefitError
from refit.models.weights import Hook, LocalShard, LocalWeights, Part
from refit.plan.box import Box
from refit.quantise.batch import QuantiseBatch
from refit.quantise.matrix import Matrix
from refit.quantise.weights import matrices_of
from refit.transport.phases import counted_apart
from refit.transport.streams import new_stream


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
        self.load(())

    def load(self, groups: Sequence[Sequence[Job]]) -> None:
        """Run these groups from now on, instead of others. Not once a run has begun to quantise."""
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
        self._has_run: set[int] = set()
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
        found = torch.nonzero(self._flags).flatten().tolist()
        if found:
            keys = sorted({self._keys[number] for number in found})
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


class Pipeline(ABC):
    """Jobs, and the units of copies that touch them: `elements` gives a part's weight key and box, None for others.

    `jobs` makes the jobs, and makes them again, at the same boxes, where weights have new storage.
    """

    def __init__(
        self, groups: Groups, elements: Callable[[Part], Part | None], jobs: Callable[[], Iterable[Job]]
    ) -> None:
        self._groups = groups
        self._elements = elements
        self._make_jobs = jobs
        self._units: dict[tuple[Part, ...], int] = {}
        self._touched: list[list[int]] = []
        self.rebind()

    def before_reading(self, parts: Iterable[Part]) -> Hook | None:
        """See `LocalWeights.before_reading`."""
        return None

    def after_writing(self, parts: Iterable[Part]) -> Hook | None:
        """See `LocalWeights.after_writing`."""
        return None

    def rebind(self) -> None:
        """Weights have new storage: make the jobs again when they are next asked for."""
        self._jobs: list[Job] = []
        self._is_grouped = False

    @property
    def jobs(self) -> Sequence[Job]:
        if not self._jobs:
            self._jobs = list(self._make_jobs())
            self._places: dict[Part, list[int]] = defaultdict(list)
            for number, job in enumerate(self._jobs):
                self._places[_place(job.matrix.key, job.box)].append(number)
        return self._jobs

    @property
    def groups(self) -> Groups:
        """The groups, made again where jobs or units of copies are new."""
        if not self._is_grouped:
            self._is_grouped = True
            jobs = self.jobs
            self._groups.load([[jobs[number] for number in group] for group in self._grouped()])
        return self._groups

    def begin(self) -> None:
        """A run begins."""
        self.groups.begin()

    def close(self) -> None:
        """Drop all references to weights."""
        self._make_jobs = list
        self._jobs = []
        self._groups.load(())

    @abstractmethod
    def _grouped(self) -> Sequence[Sequence[int]]:
        """The numbers of the jobs of every group."""

    def _unit(self, parts: Iterable[Part]) -> int | None:
        """The number of the copies with these parts; None where they touch no job."""
        weights = tuple(found for part in parts if (found := self._elements(part)) is not None)
        if not weights:
            return None
        if weights not in self._units:
            self._units[weights] = len(self._touched)
            self._touched.append(sorted({number for part in weights for number in self._overlapping(part)}))
            self._is_grouped = False
        return self._units[weights]

    def _overlapping(self, part: Part) -> Iterator[int]:
        key, whole = part
        jobs = self.jobs
        for box in matrices_of(whole):
            for number in self._places.get(_place(key, box), ()):
                if jobs[number].box.intersect(box) is not None:
                    yield number


def _place(key: str, box: Box) -> Part:
    """Where a matrix is found: the key, and the box without the last two dims."""
    return key, Box(box.offsets[:-2], box.extents[:-2])


class OnDemand(Pipeline):
    """Quantises what copies are about to read. A group is what one unit of copies is the first to read."""

    def before_reading(self, parts: Iterable[Part]) -> Hook | None:
        unit = self._unit(parts)
        return None if unit is None else lambda: self._require(unit)

    def _require(self, unit: int) -> None:
        groups = self.groups
        for number in self._needs[unit]:
            groups.require(number)

    def _grouped(self) -> Sequence[Sequence[int]]:
        group_of: dict[int, int] = {}
        found: list[list[int]] = []
        for touched in self._touched:
            new = [number for number in touched if number not in group_of]
            if new:
                group_of.update(dict.fromkeys(new, len(found)))
                found.append(new)
        self._needs = [sorted({group_of[number] for number in touched}) for touched in self._touched]
        return found


class OnArrival(Pipeline):
    """Quantises what copies have completed. A group is what becomes complete with the same units of copies."""

    def begin(self) -> None:
        super().begin()
        self._missing = [len(units) for units in self._units_of]
        self._marks: list[list[torch.cuda.Event]] = [[] for _ in self._units_of]

    def after_writing(self, parts: Iterable[Part]) -> Hook | None:
        unit = self._unit(parts)
        return None if unit is None else lambda: self._written(unit)

    def _written(self, unit: int) -> None:
        groups = self.groups
        mark = groups.mark()
        for number in self._completes[unit]:
            self._missing[number] -= 1
            self._marks[number] += [] if mark is None else [mark]
            if self._missing[number] == 0:
                groups.run(number, self._marks[number])

    def _grouped(self) -> Sequence[Sequence[int]]:
        writers: list[list[int]] = [[] for _ in self.jobs]
        for unit, touched in enumerate(self._touched):
            for number in touched:
                writers[number].append(unit)
        found: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, units in enumerate(writers):
            found[tuple(units)].append(number)
        self._units_of = list(found)
        self._completes: list[list[int]] = [[] for _ in self._touched]
        for group, completed_by in enumerate(found):
            for unit in completed_by:
                self._completes[unit].append(group)
        return list(found.values())


class PipelinedWeights(LocalWeights):
    """A side as the wire sees it, with what is to be done beside the wire."""

    is_pipelined = True

    def __init__(self, shards: Iterable[LocalShard], pipeline: Pipeline) -> None:
        super().__init__(shards)
        self._pipeline = pipeline

    def before_reading(self, parts: Iterable[Part]) -> Hook | None:
        return self._pipeline.before_reading(parts)

    def after_writing(self, parts: Iterable[Part]) -> Hook | None:
        return self._pipeline.after_writing(parts)

    def refresh(self) -> bool:
        has_moved = super().refresh()
        if has_moved:
            self._pipeline.rebind()
        return has_moved
