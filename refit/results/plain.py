"""Text from files made harmless for a terminal, in one line."""

from __future__ import annotations

import unicodedata

MAX_CHARACTERS = 2000
"""Longer text is cut: names and reasons are shorter, and tables have to hold them."""

UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that move the cursor, change the direction of text, cannot be encoded or show nothing."""


def plain(text: str, limit: int = MAX_CHARACTERS) -> str:
    """`text` in one line without control characters: blanks for line breaks and tabs, `\\x1b` for the others."""
    if len(text) > limit:
        text = text[:limit] + " ..."
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_plain_character, text))


def _plain_character(character: str) -> str:
    if character in "\n\r\t":
        return " "
    if unicodedata.category(character) not in UNSAFE:
        return character
    return character.encode("unicode_escape").decode("ascii")
