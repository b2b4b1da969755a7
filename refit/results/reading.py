"""Reads JSON that may be damaged or hostile: bounded in size, depth, numbers and text."""

from __future__ import annotations

import json
import math
from pathlib import Path

from refit.errors import UsageError
from refit.results.plain import plain

MAX_FILE_BYTES = 1 << 30
MAX_DEPTH = 50
MAX_TEXT = 200_000
"""Characters of one string. A command with all its flags is far shorter."""

MAX_NUMBER = 10**20
"""Above every byte count, seed and speed that a run can have."""

WEIGHTS = ("expected", "found", "max_difference", "max_logit")
"""Fields that hold a weight or a logit: wrong ones may have any value, and versions 1 and 2 wrote NaN."""


STEP_NUMBERS = ("loss", "grad_norm")
"""Fields that a training that diverges may bring to any size. Results have no loss or norm that is not finite."""


class UnreadableFile(UsageError):
    """A file that is no result or sweep of this benchmark. `reason` is why, in one line without control characters."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        self.path = path
        self.reason = plain(reason, 300)
        super().__init__(f"{plain(str(path))} {self.reason}: {remedy}" if remedy else f"{path} {self.reason}")

    @property
    def skipped(self) -> str:
        """`skipped FILE: reason`."""
        return f"skipped {plain(str(self.path))}: {self.reason}"


def read_json(path: Path) -> object:
    """The JSON in a file; None for an empty one.

    Raises OSError, and ValueError (such as json.JSONDecodeError) or RecursionError for content out of bounds.
    """
    if not path.is_file() and path.exists():
        raise ValueError("it is not a regular file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return None
    content = json.loads(text)
    check_bounds(content)
    return content


def check_bounds(content: object) -> None:
    """Raise ValueError, naming the place, for text, numbers and nesting that no result has."""
    pending: list[tuple[str, object, int]] = [("$", content, 0)]
    while pending:
        place, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep, at `{place[:80]}`")
        if isinstance(value, dict):
            for name in value:
                _check_text(name, place)
            pending += [(f"{place}.{name[:40]}", inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{place}[{index}]", inner, depth + 1) for index, inner in enumerate(value)]
        elif isinstance(value, str):
            _check_text(value, place)
        elif isinstance(value, int | float):
            _check_number(value, place)


def _check_text(text: str, place: str) -> None:
    if len(text) > MAX_TEXT:
        raise ValueError(f"text of {len(text):,} characters, more than {MAX_TEXT:,} - at `{place}`")


def _check_number(number: float, place: str) -> None:
    name = place.rpartition(".")[2]
    if isinstance(number, float) and name in WEIGHTS:
        return
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"a number that is not finite - at `{place}`")
    if abs(number) > MAX_NUMBER and not (isinstance(number, float) and name in STEP_NUMBERS):
        raise ValueError(f"a number beyond 10^20 - at `{place}`")
