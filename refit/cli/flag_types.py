"""How the text after a flag becomes a value. Each raises argparse.ArgumentTypeError with what was expected."""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from refit.config.registry import ENGINES

MAX_PATTERN = 100_000
"""Most entries of a list of layers in `--moe-layer-freq`."""


def positive(text: str) -> int:
    """1, 2, 3, ..."""
    return _at_least(1, text)


def non_negative(text: str) -> int:
    """0, 1, 2, ..."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def seconds(text: str) -> float:
    """A finite time above zero."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return number


def layer_frequency(text: str) -> int | tuple[bool, ...]:
    """`N` (every N-th layer has experts) or a list such as `([0]*1+[1]*60)`, one entry per layer.

    The same two forms as `moe_freq_type` in Megatron-LM's arguments.py, read without evaluating code.
    """
    if "[" not in text:
        return positive(text)
    try:
        pattern = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError):
        pattern = None
    if not isinstance(pattern, list) or any(entry not in (0, 1) for entry in pattern):
        raise argparse.ArgumentTypeError(f"expected a number or a list of 0 and 1 like ([0]*1+[1]*60), got {text!r}")
    return tuple(bool(entry) for entry in pattern)


def _evaluate(node: ast.expr) -> Any:
    """Integers, lists, `+` and `*`, nothing else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(entry) for entry in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        lengths = [len(side) if isinstance(side, list) else abs(side) for side in (left, right)]
        if math.prod(lengths) <= MAX_PATTERN:
            return left * right
    raise ValueError("not a list of layers")


def engines(text: str) -> tuple[str, ...]:
    """`refit,megatron`: names of `ENGINES`, each kept once. `both` stands for those two."""
    words = (("refit", "megatron") if word == "both" else (word,) for word in text.split(","))
    names = tuple(dict.fromkeys(itertools.chain.from_iterable(words)))
    unknown = next((name for name in names if name not in ENGINES), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"invalid choice: {unknown!r} (choose from {', '.join((*ENGINES, 'both'))})")
    return names


def file_stem(text: str) -> str:
    """A file's name without its suffix: letters, digits and `_`, then also `-`, `+`, `=` and dots."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _ - + = and dots, got {text!r}")
    return text


def provider(text: str) -> str:
    """`module:function`."""
    module, colon, function = text.partition(":")
    if not (colon and module and function.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected module:function, got {text!r}")
    return text


def refusal(neutral: str, reason: str) -> Callable[[str], str]:
    """A type that takes only `neutral` ("" for no value at all). Its error for other values gives `reason`."""

    def check(text: str) -> str:
        if neutral and text == neutral:
            return text
        raise argparse.ArgumentTypeError(f"{text} is not supported: {reason}")

    return check


class RefusedSwitch(argparse.Action):
    """A flag without a value that cannot be honoured. Its `const` gives the reason."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is not supported: {self.const}")
