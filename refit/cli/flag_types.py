"""How the text after a flag becomes a value. Each raises argparse.ArgumentTypeError with what was expected."""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from refit.config import limits
from refit.config import pipeline_layout as layouts
from refit.config.registry import BOTH, ENGINES, MEASUREMENTS
from refit.config.yaml_files import shortened
from refit.errors import UsageError

MAX_PATTERN_TEXT = 10_000
"""Most characters of a list of layers in `--moe-layer-freq`."""


def positive(text: str) -> int:
    """1, 2, 3, ... up to MAX_COUNT."""
    return _whole_number(text, 1, limits.MAX_COUNT)


def non_negative(text: str) -> int:
    """0, 1, 2, ... up to MAX_COUNT."""
    return _whole_number(text, 0, limits.MAX_COUNT)


def absolute_path(text: str) -> str:
    """A path, which this machine need not have. Links stay: the Python of an environment is one."""
    return str(Path(text).absolute())


def up_to(most: int, least: int = 1) -> Callable[[str], int]:
    """A type for `least` up to `most`."""
    return lambda text: _whole_number(text, least, most)


def _whole_number(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {shortened(text)}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    if number > most:
        raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {_abbreviated(number)}")
    return number


def _abbreviated(number: int) -> str:
    return f"{number:,}" if number < 10**30 else f"a number of {len(str(number))} digits"


def seconds(text: str) -> float:
    """A time above zero, up to MAX_TIMEOUT_S."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected seconds, got {shortened(text)}") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    if number > limits.MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"must be at most {limits.MAX_TIMEOUT_S:,} seconds, got {text}")
    return number


def key_parts(text: str) -> tuple[str, ...]:
    """`router,norm`: parts of tensor keys."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected parts of tensor keys such as router,norm, got {shortened(text)}")
    return parts


def layer_frequency(text: str) -> int | tuple[bool, ...]:
    """`N` (every N-th layer has experts) or a list such as `([0]*1+[1]*60)`, one entry per layer.

    The same two forms as `moe_freq_type` in Megatron-LM's arguments.py, read without evaluating code.
    """
    if "[" not in text:
        return positive(text)
    try:
        pattern = _evaluate(ast.parse(text.strip(), mode="eval").body) if len(text) <= MAX_PATTERN_TEXT else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # MemoryError: too many brackets
        pattern = None
    if not isinstance(pattern, list) or any(entry not in (0, 1) for entry in pattern):
        expected = "expected a number or a list of 0 and 1 like ([0]*1+[1]*60)"
        raise argparse.ArgumentTypeError(f"{expected}, got {shortened(text)}")
    return tuple(bool(entry) for entry in pattern)


def _evaluate(node: ast.expr) -> Any:
    """Integers, lists, `+` and `*`, nothing else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(entry) for entry in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        lengths = [len(side) if isinstance(side, list) else abs(side) for side in (left, right)]
        if isinstance(node.op, ast.Add) and sum(lengths) <= limits.MAX_LAYERS:
            return left + right
        if isinstance(node.op, ast.Mult) and math.prod(lengths) <= limits.MAX_LAYERS:
            return left * right
    raise ValueError("not a list of layers")


def engines(text: str) -> tuple[str, ...]:
    """`refit,megatron`: names of `ENGINES`, each kept once. `both` stands for those two."""
    words = (BOTH if word == "both" else (word,) for word in text.split(","))
    names = tuple(dict.fromkeys(itertools.chain.from_iterable(words)))
    unknown = next((name for name in names if name not in ENGINES), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"invalid choice: {unknown!r} (choose from {', '.join((*ENGINES, 'both'))})")
    return names


def measurements(text: str) -> tuple[str, ...]:
    """`refit,train-step`: names of `MEASUREMENTS`, each once, in that table's order."""
    words = text.split(",")
    unknown = next((word for word in words if word not in MEASUREMENTS), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"invalid choice: {unknown!r} (choose from {', '.join(MEASUREMENTS)})")
    return tuple(name for name in MEASUREMENTS if name in words)


def pipeline_layout(text: str) -> layouts.PipelineLayout:
    """The layers of every model chunk, from Megatron-LM's text for them."""
    try:
        return layouts.pipeline_layout(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rate(text: str) -> float:
    """A number from 0 up to 1000: a learning rate, a decay, a norm."""
    return _number(text, 0, 1000)


def factor(text: str) -> float:
    """A number from 1 up to 1000: how much more room there is than needed."""
    return _number(text, 1, 1000)


def _number(text: str, least: int, most: int) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {shortened(text)}") from None
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {text}")
    return number


def loss_scale(text: str) -> float:
    """A power of two from 1 to 2**32, Megatron-LM's default: multiplying by it changes no digit of a gradient."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {shortened(text)}") from None
    if not 1 <= number <= 2**32 or not math.log2(number).is_integer():
        raise argparse.ArgumentTypeError(f"must be a power of two from 1 to {2**32}, got {text}")
    return number


def file_stem(text: str) -> str:
    """A file's name without its suffix: letters, digits and `_`, then also `-`, `+`, `=` and dots."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _ - + = and dots, got {shortened(text)}")
    if len(text) > limits.MAX_NAME:
        raise argparse.ArgumentTypeError(f"has {len(text)} characters, {limits.MAX_NAME} are the most: shorten it")
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
