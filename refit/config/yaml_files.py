"""The YAML files under `configs/`: finding them by name and reading them.

Read are mappings, lists, text, decimal numbers, `true`, `false`, `null`, and anchors with their aliases and merge keys
(`<<`), within the limits below. Anything else that YAML has (dates, binary data, other tags) is text or refused. Every
error is one UsageError.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from pathlib import Path
from typing import Any

import yaml

from refit.errors import UsageError

_PACKAGED = Path(__file__).resolve().parents[1] / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).resolve().parents[2] / "configs"
"""In an installed wheel inside the package, in a checkout at its top."""

MAX_FILE_BYTES = 256 << 10
MAX_DEPTH = 16
"""Deepest nesting of lists and mappings."""

MAX_VALUES = 100_000
"""Values of a file, with every alias written out: a few lines of aliases can stand for billions."""

MAX_DIGITS = 18
"""Most digits of a whole number: what 64 bits hold."""

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = ("", "~", "null")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's loader, with tags of its own for plain scalars: a date, an octal or a sexagesimal number is text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's way of declaring them


for _tag, _pattern, _first in (
    ("bool", re.compile(rf"(?:{'|'.join(_BOOL)})$", re.IGNORECASE), "tTyYoOfFnN"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(rf"(?:{_INT.pattern})$"), "-+0123456789"),
    ("float", re.compile(rf"(?:{_FLOAT.pattern})$"), "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


def names(kind: str) -> list[str]:
    """Names of the files in `configs/<kind>`, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def summary(kind: str, name: str) -> str:
    """The first sentence of the comment that a file of `configs/<kind>` begins with; "" without one.

    Raises UsageError where it cannot be read.
    """
    lines = itertools.takewhile(lambda line: line.startswith("#"), read_text(find(kind, name)).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines).partition(". ")[0].rstrip(".")


def find(kind: str, name: str) -> Path:
    """The file for `name`: `name` itself where it is a path to a YAML file, otherwise `configs/<kind>/<name>.yaml`.

    Raises UsageError, listing the known names, for an unknown name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = names(kind)
    if name in known:
        return CONFIG_DIR / kind / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise UsageError(
        f"unknown {kind.removesuffix('s')} {name!r}: {hint} {', '.join(known)}, or give a path to a .yaml file"
    )


def read_mapping(path: Path, of_list: str = "") -> dict[str, object]:
    """The YAML mapping in `path`; keys are text. `of_list` says what a list's place in it is, if it has one.

    Raises UsageError, with line and column, where the file cannot be read, is something else or exceeds a limit.
    """
    text = read_text(path)
    try:
        _check_depth(path, text)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise UsageError(f"{path} is not valid YAML{_at(mark)}: {problem}") from None
    except (ValueError, OverflowError, RecursionError) as error:  # a character escape out of range, for one
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    content = _Reader(path).value(root) if root is not None else None
    if not isinstance(content, dict):
        remedy = f": put {of_list}" if isinstance(content, list) and of_list else ""
        raise UsageError(f"{path} must hold `key: value` lines, not {_kind(content)}{remedy}")
    return content


def shortened(value: object, limit: int = 100) -> str:
    """`value` as Python writes it, cut after `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def read_text(path: Path) -> str:
    """The text of a file. Raises UsageError where it is too large, not a file or not UTF-8."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"{path} is a device or a pipe: give a file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise UsageError(f"{path} has more than {MAX_FILE_BYTES:,} bytes, the most that is read: split it")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from None
    except ValueError as error:  # a null character in the path
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from None


def _check_depth(path: Path, text: str) -> None:
    """Refuse deep nesting before anything is built, since building recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _error(path, event.start_mark, f"lists and mappings are nested more than {MAX_DEPTH} deep")


class _Reader:
    """Turns the nodes of one file into values, and counts them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_values = 0

    def value(self, node: yaml.Node, depth: int = 0) -> object:
        """The value of a node, which an alias may have nested deeper than it stands."""
        self._num_values += 1
        if self._num_values > MAX_VALUES or depth > MAX_DEPTH:
            most = f"{MAX_VALUES:,} values" if depth <= MAX_DEPTH else f"{MAX_DEPTH} levels"
            raise _error(self._path, node.start_mark, f"its aliases written out have more than {most}")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(entry, depth + 1) for entry in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
            return _scalar(self._path, node, kind)
        raise _error(self._path, node.start_mark, f"values of type {node.tag} are not read: give text or a number")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, object]:
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(self._path, key_node.start_mark, "a key must be text")
            key = str(_scalar(self._path, key_node, "str"))
            value = self.value(value_node, depth + 1)
            if key == "<<" and not key_node.style:  # not in quotes
                if not isinstance(value, dict):
                    raise _error(self._path, value_node.start_mark, "<< takes a mapping")
                merged = {**value, **merged}
                continue
            if key in own:
                where = f"{self._path}{_at(key_node.start_mark)}"
                raise UsageError(
                    f"{where}: key {shortened(key)} is given twice, it is in line {lines[key]} already: remove one"
                )
            lines[key] = key_node.start_mark.line + 1
            own[key] = value
        return {**merged, **own}


def _scalar(path: Path, node: yaml.ScalarNode, kind: str) -> object:
    """Text, or a number, truth value or null. A tag such as `!!int` may contradict the text, which is refused."""
    text: str = node.value
    if kind == "str":
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _error(path, node.start_mark, "text with half a surrogate pair")
        return text
    if kind == "int" and _INT.fullmatch(text):
        digits = sum(character.isdigit() for character in text)
        if digits > MAX_DIGITS:
            raise _error(path, node.start_mark, f"a whole number of {digits:,} digits, {MAX_DIGITS} are the most")
        return int(text.replace("_", ""))
    if kind == "float" and _FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise _error(path, node.start_mark, f"{shortened(text)} is too large for a number")
        return number
    if kind == "bool" and text.lower() in _BOOL:
        return _BOOL[text.lower()]
    if kind == "null" and text.lower() in _NULL:
        return None
    raise _error(path, node.start_mark, f"{shortened(text)} is not of the type {node.tag} given with it")


def _error(path: Path, mark: Any, problem: str) -> UsageError:
    return UsageError(f"{path}{_at(mark)}: {problem}")


def _at(mark: Any) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"
