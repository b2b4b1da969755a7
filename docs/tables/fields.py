"""The lists of fields of files, from the types that are written to them, and of columns of exported tables.

A type's docstring says what it is, the string below a field what that means.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType

from refit.config import limits
from refit.config.options import MethodOptions, SideOptions, flags_of
from refit.config.registry import FORMATS, MEASUREMENTS, METHODS, load
from refit.errors import UsageError
from refit.report.plans.dry_run_json import DryRunFigures
from refit.report.refits import export
from refit.results.result import Result
from refit.results.sweep import Sweep

FILES: dict[str, type] = {"result": Result, "sweep": Sweep, "dry-run": DryRunFigures}
"""The types of files, by the names in a document's marks. Of each, types of those before it have their tables there."""

COLUMNS, LIMITS = "columns", "limits"
"""Names of other lists: of tables for programs, and the largest sizes."""

UNITS = {
    "_gb_per_s": "GB/s",
    "_bytes_per_s": "bytes/s",
    "_flops_per_s": "FLOP/s",
    "_s": "seconds",
    "bytes": "bytes",
    "_by_rank": "bytes",
}
"""The unit of a number by the end of its field's name; the first that fits."""

MOST_LISTED = 4
"""An enumeration of more values is text, and its field's meaning says which there are."""

SCALARS = {str: "text", bool: "boolean", int: "integer", float: "number", NoneType: "null", typing.Any: "any"}


def section(name: str) -> str:
    """Every type that the file `name` can hold, as headings and tables in Markdown: each before those of its fields.

    COLUMNS and LIMITS are tables of these. Raises UsageError for another name.
    """
    if name == COLUMNS:
        return _columns()
    if name == LIMITS:
        return _limits()
    if name not in FILES:
        raise UsageError(f"fields {name}: it is none of {', '.join((*FILES, COLUMNS, LIMITS))}")
    found: list[type] = []
    for each, kind in FILES.items():
        first = len(found)
        _collect(kind, found)
        if each == name:
            break
    return "\n\n".join(map(_table, found[first:]))


def _collect(kind: type, found: list[type]) -> None:
    """Append `kind` and the dataclasses that its fields hold to `found`, but for those that are there."""
    if is_dataclass(kind) and kind not in found:
        found.append(kind)
        for _, hint in _hints(kind):
            for part in _parts(hint):
                _collect(part, found)


def _table(kind: type) -> str:
    about = _words((inspect.getdoc(kind) or "").split("\n\n")[0])
    meanings = field_docs(kind)
    rows = [f"| `{name}` | {_text(hint, name)} | {_words(meanings.get(name, ''))} |" for name, hint in _hints(kind)]
    header = ["| field | type | meaning |", "| --- | --- | --- |"]
    return "\n".join([f"## {kind.__name__}", "", textwrap.fill(about, 118), "", *header, *rows])


def _columns() -> str:
    parts: dict[str, Sequence[export.Column | export.SampleColumn]] = {
        "## Columns": export.COLUMNS,
        "### Columns with samples": (*export.IDENTITY, *export.SAMPLE_COLUMNS),
    }
    return "\n\n".join(
        "\n".join(
            [title, "", "| column | meaning |", "| --- | --- |", *(f"| `{c.name}` | {c.meaning} |" for c in columns)]
        )
        for title, columns in parts.items()
    )


def _limits() -> str:
    meanings = docs_below(ast.parse(inspect.getsource(limits)).body)
    rows = [f"| {text.splitlines()[0].rstrip('.')} | {getattr(limits, name):,} |" for name, text in meanings.items()]
    return "\n".join(["## Limits", "", "| what | most |", "| --- | ---: |", *rows])


def _words(text: str) -> str:
    """Python's text for JSON's readers."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def _hints(kind: type) -> list[tuple[str, object]]:
    """Names and types of a dataclass's fields. Where a registry decides, the type is that of any of its rows."""
    hints = typing.get_type_hints(kind)
    held = {**hints, "measurements": dict[str, _any_of(MEASUREMENTS, "result")]} if kind is Result else hints
    return [(field.name, held[field.name]) for field in fields(kind)]


@cache
def _any_of(rows: typing.Any, attribute: str) -> typing.Any:
    named = (getattr(rows[name], attribute) for name in rows)
    return typing.Union[tuple(dict.fromkeys(load(name) for name in named if name))]  # noqa: UP007


def _opened(hint: object) -> object:
    if hint is SideOptions:
        return _any_of(FORMATS, "options")
    return _any_of(METHODS, "options") if hint is MethodOptions else hint


def _parts(hint: object) -> Iterator[type]:
    """The classes that a type is made of."""
    hint = _opened(hint)
    inner = typing.get_args(hint)
    if isinstance(hint, type) and not inner:
        yield hint
    for each in inner:
        yield from _parts(each)


def _text(hint: object, name: str) -> str:
    """A type as JSON has it; numbers by their unit."""
    hint = _opened(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return ", ".join(_text(each, name) for each in inner)
    if origin is tuple:
        of = inner[:1] if inner[-1] is ... else inner
        return f"list of {' and '.join(_text(each, name) for each in of)}"
    if origin is dict:
        return f"object of {_text(inner[1], name)}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "text" if len(hint) > MOST_LISTED else ", ".join(f"`{member.value}`" for member in hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if hint in (int, float):
        return _unit(name) or SCALARS[hint]
    return SCALARS.get(typing.cast(type, hint), "text")


def _unit(name: str) -> str | None:
    name = name.removesuffix("_per_rank")
    return "seconds" if name == "seconds" else next((u for end, u in UNITS.items() if name.endswith(end)), None)


def field_docs(kind: type) -> dict[str, str]:
    """The string below each field of a class that has one, in one line; of a setting with a flag the flag's help."""
    flags = {name: f"{flag.help} ({_names(flag.names)})" for name, flag in flags_of(kind).items()}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return flags | docs_below(tree.body)


def docs_below(body: Sequence[ast.stmt]) -> dict[str, str]:
    """The string below each field or constant that has one."""
    found = {}
    for named, node in itertools.pairwise(body):
        target = named.targets[0] if isinstance(named, ast.Assign) else getattr(named, "target", None)
        if isinstance(target, ast.Name) and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[target.id] = str(node.value.value)
    return found


def _names(names: tuple[str | None, ...]) -> str:
    return ", ".join(f"`--{name}`" for name in names if name)
