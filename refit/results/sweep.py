"""The files of a sweep: the sweep file, and the files of each attempt at a scenario.

All files of a sweep are in one directory, and their names begin with its run id. The sweep file, `<RUN_ID>_sweep.json`,
lists the scenarios. The first attempt at a scenario writes `<RUN_ID>_<NAME>.log` and `.json`, the second
`<RUN_ID>_<NAME>.2.log` and `.2.json`, and so on. A scenario's outcome is that of its last attempt.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from refit.config.limits import MAX_COUNT
from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.cost import Bound, Cost
from refit.results.checks import check_bound, check_cost
from refit.results.options import typed_side, with_typed_options
from refit.results.reading import UnreadableFile, read_json
from refit.results.result import Result, converted, encoded, read_result, replace_text
from refit.results.status import Status
from refit.results.upgrade import SWEEP_VERSION, upgraded_sweep

SWEEP_SUFFIX = "_sweep.json"
RESERVED_NAMES = ("sweep", "summary")
"""Scenario names that would make a sweep's own files ambiguous."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+=-]{0,149}")
"""A name without dots: `<NAME>.2` is a second attempt."""

FILE_PART = re.compile(r"[^/\x00-\x1f\x7f]{0,200}")
"""A run id read from a file: it stays in the directory."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One scenario of a sweep, with the results of the check before the run."""

    name: str
    flags: tuple[str, ...]
    """All flags of benchmark_refit.py except for the result's path."""
    source: SideSpec | None
    """None where the flags give no valid layout."""
    destination: SideSpec | None
    """None likewise."""
    mode: str
    method: str
    num_ranks: int
    """Of both sides."""
    nodes: int
    """That they need."""
    ranks_per_node: int
    status: Status
    """`ready`, `refused` or `skipped` by the check."""
    reason: str | None = None
    """Why it is refused or skipped."""
    cost: Cost | None = None
    """None where it cannot be predicted."""
    bound: Bound | None = None
    """None where it cannot be predicted."""
    memory_bytes: int | None = None
    """Of the fullest GPU, staging included; None where it cannot be predicted."""
    notes: tuple[str, ...] = ()
    """Choices made for the user."""
    scenario: Scenario | None = None
    """What the flags mean, None where they are refused; results are compared with it."""
    run_of: str | None = None
    """The scenario that this is one of several runs of; None where it runs once."""

    @property
    def way(self) -> str:
        """The method, and the encoding where one was chosen."""
        return self.method if self.scenario is None else self.scenario.way

    @property
    def num_gpus(self) -> int:
        """GPUs that its ranks use."""
        return math.ceil(self.num_ranks / (self.scenario.ranks_per_gpu if self.scenario else 1))

    @property
    def uses_destination(self) -> bool:
        """Whether anything is measured on the destination; True where the flags are refused."""
        return self.scenario is None or "destination" in self.scenario.used_sides

    @property
    def refits(self) -> bool:
        """Whether a refit is measured; True where the flags are refused."""
        return self.scenario is None or "refit" in self.scenario.measurements


@dataclass(frozen=True, slots=True)
class Sweep:
    """Scenarios that run one after another in one allocation."""

    run_id: str
    title: str
    date: str
    jobs: tuple[str, ...]
    """The Slurm jobs that worked on it, in order."""
    nodes: int
    num_gpus: int
    """That it may use."""
    gpus_per_node: int
    cluster: str | None
    """The name of that whose speeds bounds have."""
    scenarios: tuple[Planned, ...]
    schema_version: int = SWEEP_VERSION

    def scenario(self, name: str) -> Planned:
        """The scenario called `name`. Raises UsageError, listing the known names, for an unknown one."""
        for planned in self.scenarios:
            if planned.name == name:
                return planned
        names = ", ".join(planned.name for planned in self.scenarios)
        raise UsageError(f"sweep {self.run_id} has no scenario {name!r}: there are {names}")

    @property
    def num_runs(self) -> int:
        """Runs of each scenario."""
        return max(Counter(planned.run_of for planned in self.scenarios if planned.run_of).values(), default=1)

    @property
    def distinct(self) -> tuple[Planned, ...]:
        """The scenarios, each once and under its own name, however often it is run."""
        first = {planned.run_of or planned.name: planned for planned in reversed(self.scenarios)}
        return tuple(replace(planned, name=name) for name, planned in reversed(first.items()))

    def write(self, path: Path) -> None:
        """Write the sweep file in one step: readers see the old or the new sweep, never half of one."""
        replace_text(path, encoded(self))

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep in a file. Raises UnreadableFile where it cannot be read or is no sweep file."""
        try:
            sweep = converted(upgraded_sweep(read_json(path)), cls)
            sweep = replace(sweep, scenarios=tuple(map(_typed, sweep.scenarios)))
            _check(sweep)
        except OSError as error:
            raise UnreadableFile(path, f"cannot be read: {error.strerror}", "") from None
        except (ValueError, RecursionError, UsageError) as error:
            reason = f"is no sweep file of this benchmark ({error})"
            raise UnreadableFile(path, reason, "begin a new sweep") from None
        return sweep


def _typed(planned: Planned) -> Planned:
    """`planned` with the settings of formats and methods as their classes. Raises ValueError for malformed ones."""
    try:
        source, destination = (
            typed_side(side, name, converted) if side is not None else None
            for name, side in (("source", planned.source), ("destination", planned.destination))
        )
        scenario = with_typed_options(planned.scenario, converted) if planned.scenario is not None else None
    except ValueError as error:
        raise ValueError(f"scenario {planned.name}: {error}") from None
    return replace(planned, source=source, destination=destination, scenario=scenario)


def _check(sweep: Sweep) -> None:
    """Raise ValueError or UsageError for names that lead out of the sweep's directory, and for impossible sizes."""
    for number, planned in enumerate(sweep.scenarios):
        place = f"scenarios[{number}]"
        check_name(planned.name, f"{place}: name")
        for size in ("num_ranks", "nodes", "ranks_per_node"):
            if not 0 <= getattr(planned, size) <= MAX_COUNT:
                raise ValueError(f"{place}.{size}: {getattr(planned, size)} is not from 0 to {MAX_COUNT}")
        if planned.cost is not None:
            check_cost(planned.cost, f"{place}.cost")
        if planned.bound is not None:
            check_bound(planned.bound, f"{place}.bound")
    if not FILE_PART.fullmatch(sweep.run_id):
        raise ValueError("run_id cannot be part of a file name")
    if min(sweep.nodes, sweep.num_gpus) < 0 or sweep.gpus_per_node < 1:
        raise ValueError("nodes, num_gpus and gpus_per_node cannot be negative, nor the last one 0")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a scenario. Its files are `stem` with a suffix."""

    stem: Path

    @property
    def log(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.log")

    @property
    def json(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.json")

    @property
    def ranks(self) -> Path:
        """The directory of per-node and per-rank logs, kept if the attempt failed."""
        return self.stem.with_name(f"{self.stem.name}_ranks")

    @property
    def exists(self) -> bool:
        return any(path.exists() for path in (self.log, self.json, self.ranks))

    def result(self) -> Result | None:
        """The result file's content; None where the file is missing, empty or damaged."""
        try:
            return read_result(self.json) if self.has_result else None
        except UsageError:
            return None

    @property
    def has_result(self) -> bool:
        """Whether anything was written to the result file, readable or not."""
        return self.json.exists() and self.json.stat().st_size > 0


def attempts(directory: Path, run_id: str, name: str) -> list[Attempt]:
    """The attempts made at a scenario so far, first to last."""
    made: list[Attempt] = []
    while (attempt := _attempt(directory, run_id, name, len(made) + 1)).exists:
        made.append(attempt)
    return made


def next_attempt(directory: Path, run_id: str, name: str) -> Attempt:
    """The attempt that has not been made yet: none of its files exist."""
    return _attempt(directory, run_id, name, len(attempts(directory, run_id, name)) + 1)


def _attempt(directory: Path, run_id: str, name: str, number: int) -> Attempt:
    stem = f"{run_id}_{name}"
    return Attempt(directory / (stem if number == 1 else f"{stem}.{number}"))


def last_result(directory: Path, run_id: str, name: str) -> Result | None:
    """The result of the last attempt; None without an attempt or without its result."""
    made = attempts(directory, run_id, name)
    return made[-1].result() if made else None


def sweep_file(directory: Path, run_id: str) -> Path:
    """`<directory>/<run_id>_sweep.json`."""
    return directory / f"{run_id}{SWEEP_SUFFIX}"


def check_name(name: str, what: str) -> None:
    """Raise UsageError, with the remedy, unless `name` can stand in a file name."""
    if name in RESERVED_NAMES:
        raise UsageError(f"{what} {name!r} is taken by a file of the sweep itself: choose another name")
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} cannot be part of a file name: use 1 to 150 letters, digits, _ - + or =, the first no "
            "sign"
        )
