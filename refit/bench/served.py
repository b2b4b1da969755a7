"""A refit into a running engine: its phases around the refit, what it then holds, and what it generates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING

import torch.distributed as dist

from refit.bench import oracle
from refit.bench.clock import time_run, timed
from refit.bench.exchange import gather
from refit.bench.file_values import reload_source
from refit.bench.initial_weights import spread
from refit.bench.judges import judge_of
from refit.bench.measurements.rank_samples import NOTHING_FOUND
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.config.rows import Engine
from refit.config.scenario import Verify
from refit.errors import RefitError
from refit.models.vllm.engine.serving import Findings, Serving
from refit.results.refit import Sample
from refit.results.serving import Served, ServedCheck
from refit.transport.base import Program

if TYPE_CHECKING:
    pass

NUM_SETS = 2
"""Sets of weights that are compared in turn: what is left of the one before would show."""


class NotServed:
    """Of a destination that no engine serves: nothing comes before or after a refit."""

    def convert(self, label: str, program: Program) -> dict[str, float]:
        return {}

    def begin(self, label: str) -> dict[str, float]:
        return {}

    def finish(self, label: str) -> dict[str, float]:
        return {}

    def verify(self, verify: Verify) -> Findings:
        return NOTHING_FOUND

    def result(self, samples: Sequence[Sample]) -> Served | None:
        return None

    def check(self, name: str, program: Program) -> ServedCheck:
        raise AssertionError("no engine serves this destination")


class ServedBy(NotServed):
    """The engine `serving` of the destination, refitted by an engine of ENGINES. Every rank calls all methods."""

    def __init__(self, session: Session, source: Side, destination: Side, serving: Serving, row: Engine) -> None:
        self._session, self._source, self._destination = session, source, destination
        self._serving, self._commits, self._title = serving, not row.of_running, row.title
        self._parts: list[dict[str, float]] = []

    def convert(self, label: str, program: Program) -> dict[str, float]:
        """What a program makes of the source's weights while the engine still serves, and the engine's falling asleep.
        Returns the seconds by phase."""
        session, found = self._session, dict[str, float]()
        convert = getattr(program, "convert", None)
        if convert is not None:
            session.enter(f"{label}: convert")
            found |= timed(convert, session.control, session.device).value
        if self._serving.sleep_level:
            session.enter(f"{label}: sleep")
            found |= timed(self._serving.sleep, session.control, session.device).value
        return found if self._serving.process is not None else {}

    def begin(self, label: str) -> dict[str, float]:
        """Pause. Returns the seconds by phase, on the rank that has the engine.

        No rank leaves before the engine is paused: poison in a weight that is written live would reach its cache.
        """
        session = self._session
        session.enter(f"{label}: pause")
        found = timed(self._serving.begin, session.control, session.device).value
        dist.barrier(session.control)
        return found

    def finish(self, label: str) -> dict[str, float]:
        """Commit, reset the prefix cache and resume, once all ranks have come here."""
        session = self._session
        session.enter(f"{label}: commit")
        found = timed(lambda: self._serving.finish(self._commits), session.control, session.device).value
        self._parts.append(_slowest(self._serving.commit_parts) if self._commits else {})
        return found

    def verify(self, verify: Verify) -> Findings:
        """What the engine's processes find wrong, on the rank that has the engine."""
        if verify is Verify.OFF:
            return NOTHING_FOUND
        return self._serving.verify(gather(self._session.control, self._serving.digests()))

    def result(self, samples: Sequence[Sample]) -> Served | None:
        facts = self._serving.facts
        measured = [sample.iteration for sample in samples if not sample.warmup]
        mine = [self._parts[iteration] for iteration in measured]
        parts: list[dict[str, float]] = next((each for each in gather(self._session.control, mine) if any(each)), [])
        kinds = dict.fromkeys(kind for each in parts for kind in each)
        pauses = [sample.pause_s for sample in samples if not sample.warmup and sample.pause_s is not None]
        return Served(
            version=facts.version,
            num_workers=facts.num_workers,
            live=facts.live,
            copied=facts.copied,
            packed=facts.packed,
            commit_s={kind: median(each.get(kind, 0.0) for each in parts) for kind in kinds},
            pause_s=median(pauses) if pauses else None,
        )

    def check(self, name: str, program: Program) -> ServedCheck:
        """Refit other weights, twice, and have what the engine generates judged."""
        session, shape, judge = self._session, self._session.scenario.model, None
        assert shape is not None
        session.enter(f"reference for {name}")
        if self._serving.process is not None:
            judge = judge_of(shape, self._source, self._destination, self._serving, self._title, session.device)
        skipped = next(filter(None, gather(session.control, judge.skipped if judge else None)), None)
        if skipped is not None:
            return ServedCheck(passed=True, skipped=skipped)
        keeps_base = oracle.part_of(session.scenario).keeps_base
        for number in range(1, NUM_SETS + 1):
            label = f"{name} weights {number}"
            if self._source.weights is not None:
                spread(self._source.weights, number, self._source.sharding.tensors)
            self.convert(label, program)
            self.begin(label)
            if self._destination.weights is not None and not keeps_base:
                oracle.poison(self._destination.weights)
            session.enter(f"{label}: move")
            time_run(program, session.control, session.device)
            self.finish(label)
            session.enter(f"{label}: generate")
            generated = self._serving.generate()
            if judge is not None and generated is not None:
                judge.add(number, generated)
        reload_source(session, self._source)
        verdicts: list[ServedCheck | None] = gather(session.control, judge.verdict() if judge else None)
        return next(each for each in verdicts if each is not None)


def served_by(session: Session, source: Side, destination: Side, row: Engine) -> NotServed:
    """What comes before and after the refits of `row` to this destination. Raises RefitError where only a running
    engine can be refitted so."""
    serving = getattr(destination.model, "serving", None)
    if isinstance(serving, Serving):
        return ServedBy(session, source, destination, serving, row)
    if row.of_running:
        raise RefitError(f"{row.title} updates a running engine: give --rl-inference-engine-python")
    return NotServed()


@contextmanager
def served(session: Session, destination: Side) -> Iterator[None]:
    """A running engine behind `destination` ends with this context, before any rank leaves it.

    Collective: every rank of the job.
    """
    serving = getattr(destination.model, "serving", None)
    try:
        yield
        session.enter("end of the engine")
    finally:
        if isinstance(serving, Serving):
            serving.close()
    if isinstance(serving, Serving):
        dist.barrier(session.control)


def _slowest(workers: Sequence[object]) -> dict[str, float]:
    """Seconds by kind of layer, each of the worker that took longest."""
    slowest: dict[str, float] = defaultdict(float)
    for worker in workers:
        assert isinstance(worker, dict)
        for kind, seconds in worker.items():
            slowest[kind] = max(slowest[kind], seconds)
    return dict(slowest)
