"""Adds the flags of settings that one format or one method alone has (`refit.config.options`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from refit.cli import flag_types
from refit.config.options import MethodOptions, OptionFlag
from refit.config.registry import AUTO, METHODS, load, option_flags


def add_option_flag(group: argparse._ArgumentGroup, names: Sequence[str], flag: OptionFlag, help_text: str) -> None:
    """Add a setting's flag, under `names`. Where it is not given its value is None, whatever the setting's default."""
    how: dict[str, Any] = {"help": help_text}
    if flag.is_switch:
        how |= {"action": "store_true", "default": None}
    elif flag.choices is not None:
        how |= {"choices": flag.choices}
    else:
        how |= {"metavar": flag.metavar, "type": _type(flag)}
    group.add_argument(*(f"--{name}" for name in names), **how)


def _type(flag: OptionFlag) -> Callable[[str], Any]:
    if flag.parse is not None:
        return flag.parse
    return flag_types.up_to(flag.most, flag.least) if flag.most is not None else str


def attribute(flag: str) -> str:
    """The name under which argparse keeps the value of a flag without dashes."""
    return flag.replace("-", "_")


def method_flags() -> dict[tuple[str, ...], OptionFlag]:
    """The flags of all methods' settings by their spellings, in the order of METHODS. Methods may share one."""
    flags = (flag for _, row in METHODS.items() for flag in option_flags(row.options).values())
    return {tuple(name for name in flag.names if name is not None): flag for flag in flags}


def method_options(args: argparse.Namespace, method: str) -> dict[str, MethodOptions]:
    """The settings of `method` as flags gave them, by its name; those of all methods with some where it is AUTO."""
    wanted = {name: row.options for name, row in METHODS.items() if row.options and method in (name, AUTO)}
    return {name: load(options)(**_given(args, options)) for name, options in wanted.items()}


def unused_flag_notes(args: argparse.Namespace, method: str) -> Iterator[str]:
    """A line for each flag that sets what other methods have and `method` has not."""
    for names, flag in method_flags().items():
        having = [name for name, row in METHODS.items() if flag in option_flags(row.options).values()]
        if method not in (*having, AUTO) and getattr(args, attribute(names[0])) is not None:
            yield f"--{names[0]} is a setting of {' and '.join(having)}: {method} has no use for it"


def _given(args: argparse.Namespace, options: str) -> dict[str, Any]:
    """The fields of a method's settings that flags gave."""
    values = {field: getattr(args, attribute(str(flag.names[0]))) for field, flag in option_flags(options).items()}
    return {field: value for field, value in values.items() if value is not None}
