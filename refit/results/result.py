"""Result: the result of one run of one scenario, and its file.

The file is created when a run starts and rewritten after every iteration. So the measurements are on disk however the
run ends. docs/fields.md lists every field, from these types.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from refit.config.options import MethodOptions, SideOptions, UndecodedOptions
from refit.config.registry import MEASUREMENTS, load
from refit.config.scenario import Scenario
from refit.errors import UsageError
from refit.results.checks import check_refit
from refit.results.options import with_typed_options
from refit.results.reading import UnreadableFile, read_json
from refit.results.refit import RefitResult
from refit.results.status import Status
from refit.results.upgrade import RESULT_VERSION, upgraded_result

T = TypeVar("T")


GONE_TEXT = "died or was killed"
STOPPED_TEXT = "was told to stop (SIGTERM)"
CANCELLED = "cancelled"
"""The failure message of a run that a signal has ended. A resumed sweep repeats it."""

STORE_TEXT = "lost the rendezvous store"
CONSEQUENCES = (GONE_TEXT, STOPPED_TEXT, STORE_TEXT)
"""What ranks notice where one of them is ended by a signal. Which signal it was, only their launcher knows."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Which rank failed in which phase, as far as it is known, and why."""

    message: str
    rank: int | None = None
    phase: str | None = None

    def __str__(self) -> str:
        """`rank 3, phase 'plan': out of memory`, in one line."""
        where = [f"rank {self.rank}"] if self.rank is not None else []
        where += [f"phase {self.phase!r}"] if self.phase else []
        line = " ".join(self.message.split())
        return f"{', '.join(where)}: {line}" if where and line else line


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the first host."""

    name: str
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, hardware and settings."""

    command: str = ""
    """The command line."""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    """Of the suite; it ends in `-dirty` with uncommitted changes."""
    host: str | None = None
    """The first."""
    cpu: str | None = None
    num_cpus: int | None = None
    memory_bytes: int | None = None
    gpus: tuple[Gpu, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    """The environment variables that change performance."""


class MeasurementResult(Protocol):
    """The return type of a measurement: a frozen dataclass of plain values, stored as it is in the result file."""

    @property
    def status(self) -> Status: ...


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one scenario. Fields that a run did not reach are None."""

    run_id: str
    """The file's name without `.json`."""
    schema_version: int = RESULT_VERSION
    """Raised when a field is added or changes its meaning."""
    status: Status = Status.RUNNING
    """`running`, then `ok`, `wrong_data`, `waived` or `failed`."""
    exit_code: int | None = None
    """`ok` 0, `wrong_data` 1, `waived` 3, `failed` 4; None while it runs."""
    failure: Failure | None = None
    started: str | None = None
    """ISO 8601, UTC."""
    finished: str | None = None
    """ISO 8601, UTC."""
    world_size: int | None = None
    """Ranks started."""
    device: str | None = None
    """Where the models were."""
    scenario: Scenario | None = None
    """What was asked for."""
    environment: Environment | None = None
    measurements: dict[str, Any] = field(default_factory=dict)
    """What each measurement returned, by its name."""

    @property
    def refit(self) -> RefitResult | None:
        found = self.measurements.get("refit")
        return found if isinstance(found, RefitResult) else None

    @property
    def variables(self) -> dict[str, str]:
        return self.environment.variables if self.environment else {}


def default_name(scenario: Scenario) -> str:
    """`<UTC time>_<scenario>`: what a result is called without `--run-name`."""
    words = f"{scenario.title} {scenario.mode.value} {scenario.method}".lower().replace("->", "to")
    return "_".join([f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}", *words.split()])


def now() -> str:
    """The current time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def encoded(value: object) -> str:
    """A dataclass as JSON. NaN becomes null."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=1).decode()


def converted(content: object, kind: type[T]) -> T:
    """JSON values as a dataclass. Raises msgspec.ValidationError, which names the place, or UsageError."""
    return msgspec.convert(content, kind, str_keys=True, dec_hook=_typed)


def decoded_result(content: object) -> Result:
    """A result file's content, of this schema version or an older one.

    Raises ValueError (such as msgspec.ValidationError), which names the place of the error, or UsageError.
    """
    result = converted(upgraded_result(content), Result)
    scenario = with_typed_options(result.scenario, converted) if result.scenario is not None else None
    measurements = {name: _measured(name, raw) for name, raw in result.measurements.items()}
    return replace(result, scenario=scenario, measurements=measurements)


def _measured(name: str, raw: object) -> object:
    """A measurement as its result type; without a row in `MEASUREMENTS` it stays as it is in the file."""
    if name not in MEASUREMENTS:
        return raw
    try:
        found = converted(raw, load(MEASUREMENTS[name].result))
        if isinstance(found, RefitResult):
            check_refit(found)
    except ValueError as error:
        raise ValueError(f"measurement {name}: {error}") from None
    return found


def read_result(path: Path) -> Result:
    """The result in a file. An empty file, reserved by a run that has not written yet, gives a Result with a name only.

    Raises UnreadableFile where it cannot be read or is no result file.
    """
    try:
        content = read_json(path)
        return Result(path.stem) if content is None and path.stat().st_size == 0 else decoded_result(content)
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read: {error.strerror}", "") from None
    except (ValueError, RecursionError, UsageError) as error:
        remedy = "move it away, or give the result files' own folder"
        raise UnreadableFile(path, f"is no result file of this benchmark ({error})", remedy) from None


class ResultFile:
    """The file of one run's result. Pickled by its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The thread that watches a run marks a failure while the main thread may be writing a measurement.
        self._writing = threading.Lock()
        self._is_marked = False

    def __reduce__(self) -> tuple[type[ResultFile], tuple[Path]]:
        return ResultFile, (self.path,)

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
        """Replace the file's content in one step: readers see the old or the new result, never half of one.

        Does nothing once this object has been asked to mark a failure.
        """
        with self._writing:
            if not self._is_marked:
                replace_text(self.path, encoded(result))

    def read(self) -> Result:
        """The file's result, or a new one. A file that cannot be read is set aside as `<name>.json.damaged`."""
        try:
            return read_result(self.path)
        except UsageError:
            if self.path.exists():
                self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
            return Result(self.run_id)

    def mark_failed(self, exit_code: int, failure: Failure) -> bool:
        """Record a failure in a result that another rank may have written. Its measurements are kept.

        False, and nothing is changed, where another process has recorded one or is doing so. Raises OSError.
        """
        with self._writing:
            self._is_marked = True
        claim = self.path.with_name(f"{self.path.name}.failing")
        try:
            claim.open("x").close()
        except FileExistsError:
            return False
        try:
            result = self.read()
            if result.status is Status.FAILED:
                return False
            failed = replace(result, status=Status.FAILED, exit_code=exit_code, failure=failure, finished=now())
            replace_text(self.path, encoded(failed))
        finally:
            claim.unlink()
        return True


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content by `text` and a newline in one step: readers never see half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, UndecodedOptions):
        return value.values
    raise NotImplementedError(f"a {type(value).__name__} has no place in a result file")


def _typed(kind: type, value: object) -> object:
    if kind is Path:
        if not isinstance(value, str):
            raise ValueError(f"Expected a path, got {type(value).__name__}")
        return Path(value)
    if kind in (SideOptions, MethodOptions):  # whose they are is known where the format or method beside them is
        if not isinstance(value, dict):
            raise ValueError(f"Expected settings by name, got {type(value).__name__}")
        return UndecodedOptions(value)
    raise NotImplementedError(f"cannot read a {kind.__name__}")
