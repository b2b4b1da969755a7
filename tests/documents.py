"""What the documents hold that can be checked: commands in blocks, quoted messages, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = re.compile(
    r"(\w+=\S+ +)*"
    r"((\S*/)?(python3?|torchrun|refit(?! warm-up| \d)|pip)|make|sbatch|salloc|srun|(\./|\S+/)\S+\.sh)( |$)"
)
"""How a line of a block begins that is a command: perhaps with variables, then a program that this project knows."""

CONNECTORS = ("|", "&&", "||", ";", ">", "<", "2>&1")
MESSAGE = re.compile(r"(error|warning|FAILED|WAIVED|# lower bound)( \([^)]*\))?: ")
"""How a line of a block begins that is a message of this program."""

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a block. `words` are without variables in front and without what follows a pipe; `line` is all."""

    place: str
    words: tuple[str, ...]
    line: str

    @property
    def program(self) -> str:
        return self.words[0].rpartition("/")[2]


def markdown_files() -> list[Path]:
    """Every document of the project."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line and lines of each block: fenced, or indented by four spaces after an empty line."""
    lines, block, first, fenced = text.splitlines(), [], 0, False
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("```"):
            if fenced:
                yield first, block
            fenced, block, first = not fenced, [], number + 1
        elif fenced:
            block.append(line)
        elif line.startswith("    ") and (block or number == 1 or not lines[number - 2].strip()):
            first = first if block else number
            block.append(line[4:])
        elif block:
            yield first, block
            block = []
    assert not fenced, "a fence is not closed"


def commands(path: Path) -> list[Command]:
    """Every command in the blocks of a document."""
    return [
        Command(f"{path.name}:{first}", words, line)
        for first, block in blocks(path.read_text(encoding="utf-8"))
        for line in "\n".join(block).replace("\\\n", " ").splitlines()
        if PROGRAM.match(line)
        for words in _split(line)
    ]


def _split(line: str) -> Iterator[tuple[str, ...]]:
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    end = next((index for index, word in enumerate(words) if word in CONNECTORS), len(words))
    yield tuple(words[:end])
    rest = shlex.join(words[end + 1 :])
    if PROGRAM.match(rest):
        yield from _split(rest)


def messages(path: Path) -> list[str]:
    """Every message of this program that the blocks of a document quote, those of several lines in one."""
    found: list[str] = []
    for _, block in blocks(path.read_text(encoding="utf-8")):
        if not MESSAGE.match(block[0]):
            continue
        for line in block:
            if MESSAGE.match(line):
                found.append(line)
            else:
                found[-1] += f" {line.strip()}"
    return found


def links(text: str) -> list[str]:
    """Targets of links, those outside the project left out."""
    return [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> list[str]:
    """The anchors that GitHub makes of a document's headings, but for the numbers that it adds to repeated ones."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
