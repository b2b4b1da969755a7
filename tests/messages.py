"""Every text that the sources can print, as patterns: what is filled in may be anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

MIN_FIXED = 12
"""Characters a text must have apart from what is filled in, or it would match anything."""


SHELL_TEXT = re.compile(r'"[^"]*"(?:\s*\\\n\s*"[^"]*")*')
"""Strings of a shell script; those that only a line's continuation parts are one."""

SHELL_VALUE = re.compile(r"\$\{[^}]*\}|\$\w+|\$\([^)]*\)")


def templates(root: Path) -> list[re.Pattern[str]]:
    """A pattern for each string and f-string of the package, and for each text of the scripts."""
    found = set(_shell_texts(root / "scripts"))
    for path in (root / "refit").rglob("*.py"):
        found |= set(_texts(ast.parse(path.read_text(encoding="utf-8"))))
    return [re.compile(pattern) for pattern, fixed in sorted(found) if fixed >= MIN_FIXED]


def _shell_texts(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.glob("*.sh"):
        for text in SHELL_TEXT.findall(path.read_text(encoding="utf-8")):
            fixed = SHELL_VALUE.split(" ".join(re.findall(r'"([^"]*)"', text)))
            yield ".*".join(map(re.escape, fixed)), sum(map(len, fixed))


def phases(sources: Path) -> list[re.Pattern[str]]:
    """A pattern for each phase that a run names with `enter(...)`."""
    return [
        re.compile(_pattern(node.args[0])[0])
        for path in sorted(sources.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "enter"
    ]


def _texts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield _pattern(node)


def _pattern(node: ast.AST) -> tuple[str, int]:
    """A regular expression and how many of its characters are fixed."""
    if isinstance(node, ast.Constant):
        return (re.escape(node.value), len(node.value)) if isinstance(node.value, str) else ("", 0)
    if isinstance(node, ast.JoinedStr):
        parts = [_pattern(value) for value in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_pattern(node.left), _pattern(node.right)]
    else:
        return ".*", 0
    return "".join(pattern for pattern, _ in parts), sum(fixed for _, fixed in parts)
