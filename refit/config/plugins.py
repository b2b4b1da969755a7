"""Rows of the registries from outside the checkout: `--plugin MODULE`.

A plugin is a module with `REFIT_INTERFACE`, the version of the interface that it was written for, and `register()`,
which adds rows to the registries (`METHODS.add(name, row)`). The interface is what `refit.config.rows` says of a row,
with the classes that it names. See examples/plugin.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from refit.errors import UsageError, first_line

INTERFACE = 1
"""Grows when a row, or a class that rows name, changes so that what was written for it before no longer works."""

FLAG = "--plugin"

_registered: set[str] = set()


def named(words: Sequence[str]) -> list[str]:
    """The modules of every `--plugin MODULE` of a command line, each once."""
    pairs = zip(words, [*words, ""][1:], strict=True)
    found = [following if word == FLAG else word.partition("=")[2] for word, following in pairs if _is_flag(word)]
    return list(dict.fromkeys(filter(None, found)))


def without(words: Sequence[str]) -> list[str]:
    """A command line without them."""
    return [word for before, word in zip(["", *words], words, strict=False) if not _is_flag(word) and before != FLAG]


def _is_flag(word: str) -> bool:
    return word == FLAG or word.startswith(f"{FLAG}=")


def load_plugins(words: Sequence[str]) -> None:
    """Register the rows of all plugins that a command line names, once in a process.

    Raises UsageError where one cannot be imported, is none, or was written for another version of the interface.
    """
    for name in named(words):
        if name not in _registered:
            _register(name)
            _registered.add(name)


def _register(name: str) -> None:
    module = imported(name, FLAG)
    version, register = getattr(module, "REFIT_INTERFACE", None), getattr(module, "register", None)
    if version is None or not callable(register):
        raise UsageError(
            f"{FLAG} {name} is no plugin: it needs REFIT_INTERFACE = {INTERFACE} and a function register()"
        )
    if version != INTERFACE:
        raise UsageError(
            f"{FLAG} {name} was written for interface {version}, this suite has {INTERFACE}: use a version of it for "
            f"{INTERFACE}"
        )
    try:
        register()
    except Exception as error:
        raise UsageError(f"{FLAG} {name} cannot register its rows: {first_line(error)}") from error


def imported(name: str, flag: str) -> ModuleType:
    """The module `name`, looked for in the working directory too. Raises UsageError, which names `flag`."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:  # what it raises is its own
        raise UsageError(f"{flag} {name!r} cannot be imported: {first_line(error)}") from error
