"""The result file: one JSON per run, versioned, written atomically, never over another run's.

The file appears when a run starts and is rewritten after every iteration, so whatever happens to the run, what was
measured until then is on disk. Field by field it is described in docs/output.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2


@dataclass(slots=True)
class Sample:
    """One refit: seconds of every participating rank, in rank order; phases are the slowest rank's.

    `unattributed_s` is that rank's time outside all phases. `warmup` samples count for nothing but the log.
    """

    iteration: int
    warmup: bool
    seconds_per_rank: list[float]
    slowest_rank: int
    phases_s: dict[str, float]
    unattributed_s: float
    num_compared: int
    num_wrong: int

    @property
    def seconds(self) -> float:
        return max(self.seconds_per_rank)


@dataclass(slots=True)
class WrongWeights:
    """Elements of one tensor found wrong on one rank in one iteration, and the first of them."""

    iteration: int
    rank: int
    key: str
    num_wrong: int
    first_index: list[int]
    expected: float
    found: float


@dataclass(slots=True)
class EngineResult:
    """What one engine did. `status`: ok, wrong_data, waived (with `reason`) or failed (with `reason`).

    `cold_s` holds the slowest rank's seconds of planning, preparing and the first refit; `connect_s` what came before
    and is done once per process: communicators, connections, libraries and kernels loaded; `summary` is over the
    measured iterations; bytes and memory are per participating rank. `share_of_lower_bound` is the result's lower bound
    over the median: 1 where a refit is as fast as the plan allows, None without a bound.
    """

    status: str = "running"
    reason: str | None = None
    connect_s: float | None = None
    connect_memory_bytes_per_rank: list[int] = field(default_factory=list)
    cold_s: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    bottleneck_gb_per_s: float | None = None
    share_of_lower_bound: float | None = None
    wrong: list[WrongWeights] = field(default_factory=list)
    staging_bytes_per_rank: list[int] = field(default_factory=list)
    extra_memory_bytes_per_rank: list[int | None] = field(default_factory=list)
    forward: dict[str, Any] | None = None
    profile: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def num_compared(self) -> int:
        """Elements compared over all iterations, warm-up included."""
        return sum(sample.num_compared for sample in self.samples)

    @property
    def num_wrong(self) -> int:
        return sum(sample.num_wrong for sample in self.samples)

    @property
    def measured_s(self) -> list[float]:
        return [sample.seconds for sample in self.samples if not sample.warmup]


@dataclass(slots=True)
class Result:
    """One run of one scenario. `bound` has `cluster`, `lower_bound_s` and `limited_by`, or is None."""

    run_id: str
    scenario: dict[str, Any]
    environment: dict[str, Any]
    layouts: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] | None = None
    engines: dict[str, EngineResult] = field(default_factory=dict)
    status: str = "running"
    exit_code: int | None = None
    failure: dict[str, Any] | None = None
    started: str = field(default_factory=lambda: now())
    finished: str | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=str)


def now() -> str:
    """The current time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class ResultFile:
    """The place of one run's result on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, directory: Path, name: str) -> ResultFile:
        """Reserve `<directory>/<name>.json`, with a number where that is taken. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            path = directory / (f"{name}.json" if attempt == 0 else f"{name}-{attempt}.json")
            try:
                path.open("x").close()
            except FileExistsError:
                continue
            return cls(path)
        raise FileExistsError(f"{directory / name}*.json: a thousand results of this name exist already")

    @property
    def run_id(self) -> str:
        return self.path.stem

    def write(self, result: Result) -> None:
        """Replace the file's content in one step: readers see the old or the new result, never half of one."""
        replace_text(self.path, result.to_json())

    def mark_failed(self, exit_code: int, failure: dict[str, Any]) -> None:
        """Note a failure in a result that another rank may have written; its measurements stay as they are."""
        try:
            content = json.loads(self.path.read_text())
        except ValueError:  # reserved, but nothing written yet
            content = {"schema_version": SCHEMA_VERSION, "run_id": self.run_id}
        content |= {"status": "failed", "exit_code": exit_code, "failure": failure, "finished": now()}
        replace_text(self.path, json.dumps(content, indent=1))


def replace_text(path: Path, text: str) -> None:
    """Give a file `text` and a newline in one step, never leaving half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
