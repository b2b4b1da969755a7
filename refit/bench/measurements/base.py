"""Measurement: the protocol of one thing that a run measures."""

from __future__ import annotations

from typing import Protocol

from refit.bench.session import Session
from refit.bench.sides import Side
from refit.results.result import MeasurementResult


class Measurement(Protocol):
    """Constructed without arguments, once per run. A row of `MEASUREMENTS` names the class."""

    def run(self, session: Session, source: Side, destination: Side) -> MeasurementResult:
        """Measure, and return the same result on every rank.

        Partial results may be passed to `session.publish`, so that they are on disk if the run ends early.
        Collective: every rank of the job.
        """
        ...
