"""FlagParser: argparse with errors in one line that name the nearest flag."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from refit.errors import UsageError

REQUIRED = "the following arguments are required: "
"""What argparse says of arguments that were left out."""


class _Help(argparse.HelpFormatter):
    """Fills each line of a description on its own. Indented lines, which are examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line if line.startswith("  ") else super(_Help, self)._fill_text(line, width, indent)
            for line in text.split("\n")
        )


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and raises UsageError in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.removeprefix("argument ").split())
        if text.startswith(REQUIRED):
            raise UsageError(f"{text.removeprefix(REQUIRED)} missing: {self.prog} --help says what it is")
        raise UsageError(text)

    def parse_flags(self, argv: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Like `parse_args`; raises UsageError that names the nearest known flag for an unknown one."""
        for word in argv:
            self._has(word.partition("=")[0])
        parsed, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), None)
            if flag is None:
                raise UsageError(f"unexpected argument {unknown[0]!r}: every value follows a flag")
            raise self._unknown(flag.split("=")[0])
        return parsed

    def parse_mapping(self, values: Mapping[str, object]) -> argparse.Namespace:
        """Flags as a YAML file holds them, without dashes. `true` is a flag without a value, `false` leaves it out.

        Raises UsageError for an unknown flag, or a value the flag cannot take.
        """
        return self.parse_flags(self.words(values))

    def words(self, values: Mapping[str, object]) -> list[str]:
        """The command line of such a mapping. Raises UsageError for an unknown flag, or one without a value."""
        argv: list[str] = []
        for key, value in values.items():
            flag, takes_list = f"--{key}", self.takes_list(key)
            if value is None or isinstance(value, dict):
                raise UsageError(f"{key} needs a value")
            if isinstance(value, bool):
                argv += [flag] if value else []
            elif isinstance(value, list) and takes_list:
                argv += [flag, *map(str, value)]
            else:
                argv.append(f"{flag}={value}")
        return argv

    def takes_list(self, key: str) -> bool:
        """Whether the flag `--<key>` takes several values. Raises UsageError for an unknown flag."""
        flag = f"--{key}"
        if not self._has(flag):
            raise self._unknown(flag)
        return self._option_string_actions[flag].nargs == "*"

    def _has(self, flag: str) -> bool:
        """Whether there is such a flag."""
        return flag in self._option_string_actions

    def _unknown(self, flag: str) -> UsageError:
        return UsageError(f"unknown flag {flag}: {self._nearest(flag)}")

    def _known(self) -> list[str]:
        """The flags that a mistyped one may stand for."""
        return list(self._option_string_actions)

    def _nearest(self, flag: str) -> str:
        near = difflib.get_close_matches(flag, self._known(), n=1, cutoff=0.6)
        return f"did you mean {near[0]}?" if near else "no known flag is close to it, --help lists them"
