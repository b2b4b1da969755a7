"""The rows of every table over results: one entry for each scenario and engine, of any number of runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refit.report.refits.headline import between, problem_of
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult, speed_ratio
from refit.results.result import Environment
from refit.results.runs import Run
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine of one scenario. `name` and `engine` are None where no engine ran."""

    run: Run
    outcome: Outcome
    name: str | None
    engine: EngineResult | None

    @property
    def status(self) -> Status:
        """The scenario's status, or that of a baseline."""
        return self.outcome.status if self.engine is None or self.is_tested else self.engine.verdict

    @property
    def reason(self) -> str | None:
        """Why it has no valid result."""
        return self.outcome.reason if self.engine is None or self.is_tested else self.engine.reason or self.engine.fault

    @property
    def is_tested(self) -> bool:
        """Whether this is the engine that decides the scenario's status."""
        return self.engine is not None and self.engine is self.outcome.tested

    @property
    def is_valid(self) -> bool:
        """Whether there are times, and every element compared was right."""
        return self.median_s is not None and problem_of(self.outcome, self.engine) is None

    @property
    def median_s(self) -> float | None:
        return self.engine.median_s if self.engine else None

    @property
    def share_of_bound(self) -> float | None:
        """The lower bound over the median; None without either, and where the result is not valid."""
        bound = self.outcome.bound
        if bound is None or not bound.seconds or not self.median_s or not self.is_valid:
            return None
        return bound.seconds / self.median_s

    @property
    def ratio(self) -> float | None:
        """A baseline's median over that of the engine under test; None where either result is in doubt."""
        if self.engine is None or self.is_tested or self.outcome.status is not Status.OK:
            return None
        return speed_ratio(self.outcome.tested, self.engine)

    @property
    def method(self) -> str:
        """What moved its bytes; where no engine ran, what was to."""
        return self.outcome.transport_of(self.name)

    @property
    def ratio_between(self) -> str | None:
        """`shm against gloo`, where the `ratio` is one between two transports."""
        return between(self.outcome, self.name) or None if self.name is not None and self.ratio is not None else None

    @property
    def model(self) -> str | None:
        scenario = self.outcome.result.scenario if self.outcome.result else None
        return scenario.model_title if scenario else None

    @property
    def environment(self) -> Environment:
        return (self.outcome.result.environment if self.outcome.result else None) or Environment()


def entries_of(runs: Iterable[Run]) -> list[Entry]:
    """The entries of all scenarios, in order."""
    return [entry for run in runs for outcome in run.outcomes for entry in scenario_entries(run, outcome)]


def scenario_entries(run: Run, outcome: Outcome) -> Sequence[Entry]:
    """The entries of one scenario, in the order of its engines; a single one where none ran."""
    engines = outcome.refit.engines
    return [Entry(run, outcome, name, engine) for name, engine in engines.items()] or [Entry(run, outcome, None, None)]
