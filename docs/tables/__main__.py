"""Makes the documents' tables, and the picture that the README opens with, from the result files of docs/results.

    python -m docs.tables            rewrite docs/performance.md, README.md and the picture
    python -m docs.tables --check    exit code 1, naming what differs, where they do not match the files

`benchmarks.gpu_matrix`, `cpu_matrix`, `shared_gpu`, `dispatchers` and `trainers` write the files. A document's
text between the lines `<!-- results: NAME -->` and `<!-- end of results: NAME -->` is made here; it stays as it is
while NAME has no file.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from docs.tables import dispatchers, layouts, refits, trainers
from refit.report.plots.style import save
from refit.results.collection import COLLECTION_SUFFIX
from refit.results.outcomes import Outcome
from refit.results.runs import find_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("docs/results")
PICTURE = RESULTS / "opening.png"
DIGEST = "Results SHA-256"
"""The text chunk of the picture that names the results it was made from."""

OPENING = ("gpu8_speed", "gpu4_speed", "cpu_tiny")
"""Files that the README's opening may be made from: the first that exists is."""

DISPATCHERS = ("gpu8_dispatchers", "gpu4_dispatchers", "gpu2_dispatchers")
"""Files that the table of token dispatchers may be made from, as above."""

TRAINERS = ("gpu8_trainers", "gpu4_trainers", "gpu2_trainers")
"""Files that the tables of trainers may be made from, as above."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a document between two marks, and the text that results give it."""

    document: str
    name: str
    files: tuple[str, ...]
    text: Callable[[Sequence[Outcome]], str]


BLOCKS = (
    Block("README.md", "opening", OPENING, lambda outcomes: refits.opening(outcomes, PICTURE.as_posix())),
    Block("README.md", "gpu4_summary", ("gpu4_speed",), refits.summary),
    Block("docs/performance.md", "gpu4_speed", ("gpu4_speed",), refits.section),
    Block("docs/performance.md", "gpu4_large", ("gpu4_large",), refits.section),
    Block("docs/performance.md", "gpu4_drift", ("gpu4_drift",), refits.section),
    Block("docs/performance.md", "gpu4_correctness", ("gpu4_correctness",), refits.section),
    Block("docs/performance.md", "gpu4_te", ("gpu4_te",), refits.section),
    Block("docs/performance.md", "gpu4_fp8", ("gpu4_fp8",), refits.quantised_section),
    Block("docs/performance.md", "gpu4_fp8-large", ("gpu4_fp8-large",), refits.quantised_section),
    Block("docs/performance.md", "gpu1_layouts", ("gpu1_layouts",), layouts.section),
    Block("docs/performance.md", "gpu2_speed", ("gpu2_speed",), refits.section),
    Block("docs/performance.md", "gpu2_fp8", ("gpu2_fp8",), refits.quantised_section),
    Block("docs/performance.md", "dispatchers", DISPATCHERS, dispatchers.section),
    Block("docs/performance.md", "trainers", TRAINERS, trainers.section),
    Block("docs/performance.md", "cpu_tiny", ("cpu_tiny",), refits.section),
)


def outcomes_of(root: Path, files: Sequence[str]) -> Sequence[Outcome]:
    """The results of the first of these files that exists; none where there is none. Raises UnreadableFile."""
    path = _first(root, files)
    return find_run(path).outcomes if path else ()


def _first(root: Path, files: Sequence[str]) -> Path | None:
    paths = (root / RESULTS / f"{name}{COLLECTION_SUFFIX}" for name in files)
    return next((path for path in paths if path.exists()), None)


def replaced(document: str, name: str, text: str) -> str:
    """`document` with `text` between the marks of `name`. Raises ValueError where the marks are missing."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end of results: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise ValueError(f"the marks of {name} are not there once")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", document)


def documents(root: Path) -> dict[Path, str]:
    """Every document with marks, as the result files give it."""
    made: dict[Path, str] = {}
    for block in BLOCKS:
        path = root / block.document
        before = made.get(path) or path.read_text(encoding="utf-8")
        outcomes = outcomes_of(root, block.files)
        made[path] = replaced(before, block.name, block.text(outcomes)) if outcomes else before
    return made


def draw_opening(root: Path) -> None:
    """Draw the README's picture, with the digest of its results. Raises UnavailableError without matplotlib."""
    if path := _first(root, OPENING):
        save(refits.opening_figure(find_run(path).outcomes), root / PICTURE, **{DIGEST: digest(path)})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(root: Path) -> Iterator[str]:
    """What does not match the result files, one line each."""
    for path, text in documents(root).items():
        if path.read_text(encoding="utf-8") != text:
            yield f"{path.relative_to(root)} is not what its result files give"
    path = _first(root, OPENING)
    picture = root / PICTURE
    if path and not (picture.exists() and digest(path).encode() in picture.read_bytes()):
        yield f"{PICTURE} is not a picture of {path.relative_to(root)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where something differs")
    args = parser.parse_args()
    if args.check:
        found = list(differences(ROOT))
        print("\n".join([*found, "run python -m docs.tables"] if found else ["nothing differs"]))
        return 1 if found else 0
    for path, text in documents(ROOT).items():
        path.write_text(text, encoding="utf-8")
    draw_opening(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
