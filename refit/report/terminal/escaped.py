"""Text from files made harmless where it leaves: terminals and text files, Markdown, CSV, HTML and pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from refit.results.plain import plain

MARKDOWN_SIGNS = re.compile(r"([\\`*\[\]|])")
HTML_SIGNS = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What spreadsheets take for the start of a formula, or drop before one."""

FILE_WIDTH = 120
"""Width of tables in files, in characters."""

MAX_LINE = 20_000
"""Characters of a line, which may list the names of a sweep."""

MAX_CELL = 300
"""Characters of a table's cell."""


def plain_lines(lines: Iterable[str]) -> str:
    """Lines of text, joined. None of them breaks into two, and none holds control characters."""
    return "\n".join(plain(line, MAX_LINE) for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, links, emphasis or columns."""
    escaped = MARKDOWN_SIGNS.sub(r"\\\1", plain(text))
    return "".join(HTML_SIGNS.get(character, character) for character in escaped)


def markdown_code(text: str) -> str:
    """Text as a code span. Backticks, which would end it, become apostrophes, and `|` is escaped for tables."""
    shown = plain(text, MAX_CELL).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown.strip() else ""


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet runs as a formula: text that begins like one gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    return ("'" if value.lstrip(" ").startswith(FORMULA_STARTS) and not _is_number(value) else "") + plain(value)


def html_text(text: str) -> str:
    """Text that a browser shows as it is, between tags and within quotes of an attribute."""
    return html.escape(plain(text), quote=True)


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX_SIGNS.get(character, character) for character in plain(text))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def picture_text(text: str) -> str:
    """Text that matplotlib draws as it is: `$` would begin a formula."""
    return plain(text, MAX_CELL).replace("$", r"\$")
