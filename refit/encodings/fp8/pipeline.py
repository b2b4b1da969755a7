"""Quantising beside the transfer: weights are quantised in groups, each when copies need it or have completed it.

A transport copies messages and batches of local copies. `OnDemand` quantises, before a copy, what that copy is the
first to read: while the first messages are on the wire, the next ones are quantised. `OnArrival` quantises, after a
copy, the matrices that it has completed. So groups follow the transport's messages, and every pair of ranks has work
from the first message on. A rank groups its own matrices; no rank needs to know the groups of another.

On a GPU either has a stream of its own, and events order it with the streams that copy. Elsewhere the thread that
copies quantises, between its messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from refit.encodings.fp8.groups import Groups, Job
from refit.memory.views import matrices_of
from refit.memory.weights import Hook, LocalShard, LocalWeights, Part
from refit.plan.box import Box


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
        assert all(self._units_of), "a transport that calls no hooks would leave matrices as they are"
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
