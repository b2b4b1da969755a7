"""What a sweep is on disk: the sweep file, and the files that the attempts at each scenario leave beside it.

All files of a sweep lie in one directory and begin with its run id. The sweep file, `<RUN_ID>_sweep.json`, says what is
to run; `<RUN_ID>_<NAME>.log` and `.json` are what the first attempt at a scenario left, `<RUN_ID>_<NAME>.2.log` and so
on those of later ones. A scenario's outcome is that of its last attempt.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from refit.errors import UsageError
from refit.results.result import replace_text

SCHEMA_VERSION = 1
SWEEP_SUFFIX = "_sweep.json"
RESERVED_NAMES = ("sweep", "summary")
"""Scenario names that would make a sweep's own files ambiguous."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+=-]{0,149}")
"""A name without dots: `<NAME>.2` is a second attempt."""


class Status(str, Enum):
    """What the check before a run found. A skipped scenario is a cell of an axis that makes no sense."""

    READY = "ready"
    REFUSED = "refused"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Side:
    """Parallel sizes of one side."""

    tp: int
    ep: int
    etp: int
    pp: int
    world_size: int


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """Bytes of one refit. `busiest` are those of `busiest_rank`, which `busiest_direction` ("sends", "receives")
    them."""

    payload: int
    wire: int
    local: int
    busiest: int
    busiest_rank: int
    busiest_direction: str


@dataclass(frozen=True, slots=True)
class Planned:
    """One scenario of a sweep, as the check before the run left it.

    `flags` are complete flags of benchmark_refit.py but for the result's place. `source` and `destination` are None
    where the flags give no valid layout. `bytes`, `lower_bound_s`, `limited_by` and `memory_bytes` (the fullest GPU,
    staging included) are None where they cannot be predicted. `reason` says why a scenario is refused or skipped.
    """

    name: str
    flags: tuple[str, ...]
    source: Side | None
    destination: Side | None
    mode: str
    method: str
    num_ranks: int
    nodes: int
    ranks_per_node: int
    status: Status
    reason: str | None = None
    bytes: PlannedBytes | None = None
    lower_bound_s: float | None = None
    limited_by: str | None = None
    memory_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sweep:
    """Scenarios that run one after another in one allocation. `jobs` are the Slurm jobs that worked on it, in order."""

    run_id: str
    title: str
    date: str
    jobs: tuple[str, ...]
    nodes: int
    num_gpus: int
    gpus_per_node: int
    cluster: str | None
    scenarios: tuple[Planned, ...]

    def scenario(self, name: str) -> Planned:
        """Raises UsageError, listing the names there are, for an unknown one."""
        for planned in self.scenarios:
            if planned.name == name:
                return planned
        names = ", ".join(planned.name for planned in self.scenarios)
        raise UsageError(f"sweep {self.run_id} has no scenario {name!r}: there are {names}")

    def write(self, path: Path) -> None:
        """Write the sweep file in one step: readers see the old or the new sweep, never half of one."""
        replace_text(path, json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1))

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep in a file. Raises UsageError where it cannot be read or is no sweep file of this version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"sweep file {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"{path} is no sweep file: {error}") from None
        version = content.pop("schema_version", None) if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{path} is no sweep file of version {SCHEMA_VERSION}, but of {version}: begin a new sweep"
            )
        try:
            scenarios = tuple(_planned(entry) for entry in content.pop("scenarios"))
            return cls(**{**content, "jobs": tuple(content["jobs"]), "scenarios": scenarios})
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no complete sweep file ({error}): begin a new sweep") from None


def _planned(entry: dict[str, Any]) -> Planned:
    sides = {name: Side(**entry[name]) if entry[name] else None for name in ("source", "destination")}
    moved = PlannedBytes(**entry["bytes"]) if entry["bytes"] else None
    listed = {name: tuple(entry[name]) for name in ("flags", "notes")}
    return Planned(**{**entry, **sides, **listed, "bytes": moved, "status": Status(entry["status"])})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a scenario; its files are `stem` with a suffix."""

    stem: Path

    @property
    def log(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.log")

    @property
    def json(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.json")

    @property
    def ranks(self) -> Path:
        """The directory of per-node and per-rank logs, kept where the attempt failed."""
        return self.stem.with_name(f"{self.stem.name}_ranks")

    @property
    def exists(self) -> bool:
        return any(path.exists() for path in (self.log, self.json, self.ranks))

    def result(self) -> dict[str, Any] | None:
        """The result file's content; None where there is none, or nothing readable has been written to it yet."""
        try:
            content = json.loads(self.json.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


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


def last_result(directory: Path, run_id: str, name: str) -> dict[str, Any] | None:
    """The result of the last attempt; None without an attempt or where that left no result."""
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
