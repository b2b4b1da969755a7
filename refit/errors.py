"""Errors a user can act on, each with the exit code the process ends with.

Raise them with a message that holds both numbers and the remedy; `refit.cli.parsing` prints it once, without a
traceback.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    OK = 0
    WRONG_DATA = 1
    USAGE = 2
    WAIVED = 3
    FAILED = 4
    SLOWER = 5


class RefitError(Exception):
    """Base of every error with a message for the user. Ends the process with `exit_code`."""

    exit_code = ExitCode.FAILED


class UsageError(RefitError):
    """The command line, a YAML file or a combination of sizes cannot be honoured."""

    exit_code = ExitCode.USAGE


class UnavailableError(RefitError):
    """Something the scenario asks for (a transport, a library, a GPU) is not on this machine."""

    exit_code = ExitCode.WAIVED


class PlanError(RefitError):
    """Source and destination do not hold the same tensors, or no complete plan exists."""

    exit_code = ExitCode.FAILED


class ShardingError(RefitError):
    """A model does not hold what its sharding states or predicts."""

    exit_code = ExitCode.FAILED


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


CANCELLED = 143
"""Exit code of what a signal ended: 128 + SIGTERM."""

NEEDED = ("msgspec", "numpy", "rich", "yaml")
"""The packages without which no command starts."""


def explain_missing(error: ModuleNotFoundError) -> NoReturn:
    """End this process where its Python has none of the suite's packages. Raises `error` for any other module."""
    if error.name is None or error.name.partition(".")[0] not in NEEDED:
        raise error
    sys.stderr.write(
        f"error: {sys.executable} has no {error.name}: call .venv/bin/python, which `make demo` makes, or install the "
        "suite for this Python (pip install .)\n"
    )
    sys.exit(int(ExitCode.USAGE))
