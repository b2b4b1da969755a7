"""Makes the tables of the documents from the result files of docs/results, and the lists of fields from the types.

    python -m docs.tables            rewrite them
    python -m docs.tables --check    exit code 1, naming what differs, where a document is another one

The campaigns of `benchmarks` write the files. A document's text between the lines `<!-- results: NAME -->` and
`<!-- end of results: NAME -->` is made here, from NAME.jsonl; NAME ends in what its table is about (KINDS). Between
such lines with `fields` in place of `results` are the types of a file (`docs.tables.fields`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from docs.tables import dispatchers, fields, layouts, refits, trainers
from refit.errors import RefitError, UsageError
from refit.results.collection import COLLECTION_SUFFIX
from refit.results.outcomes import Outcome
from refit.results.runs import find_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("docs/results")
DOCUMENTS = ("README.md", "docs/*.md", "docs/measurements/*.md")

KINDS: dict[str, Callable[[Sequence[Outcome]], str]] = {
    "speed": refits.section,
    "fp8": refits.quantised_section,
    "layouts": layouts.section,
    "dispatchers": dispatchers.section,
    "trainers": trainers.section,
}
"""What NAME may end in, and what makes that table."""

DIRTY = "-dirty"
"""The end of the commit of a result that was measured with uncommitted changes."""

BLOCK = re.compile(
    r"<!-- (?P<made_of>results|fields): (?P<name>\S+) -->\n.*?<!-- end of (?P=made_of): (?P=name) -->", re.DOTALL
)
BEGINNING = re.compile(r"<!-- (results|fields): ")


def documents(root: Path) -> dict[Path, str]:
    """Every document with marks, as the result files and the types give it.

    Raises UsageError for marks without a file, of no known kind or without an end, and for results of no clean commit.
    """
    made: dict[Path, str] = {}
    for path in sorted(found for pattern in DOCUMENTS for found in root.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        blocks = list(BLOCK.finditer(text))
        begun = len(BEGINNING.findall(text))
        if len(blocks) != begun:
            raise UsageError(f"{path.name}: {begun} marks of results or fields begin, {len(blocks)} end")
        if blocks:
            made[path] = BLOCK.sub(lambda block: _block(root, block["made_of"], block["name"]), text)
    return made


def _block(root: Path, made_of: str, name: str) -> str:
    text = fields.section(name) if made_of == "fields" else _results(root, name)
    return f"<!-- {made_of}: {name} -->\n\n{text}\n\n<!-- end of {made_of}: {name} -->"


def _results(root: Path, name: str) -> str:
    kind = name.rpartition("_")[2]
    if kind not in KINDS:
        raise UsageError(f"results {name}: {kind} is none of {', '.join(KINDS)}")
    path = root / RESULTS / f"{name}{COLLECTION_SUFFIX}"
    if not path.exists():
        raise UsageError(f"results {name}: there is no {path.relative_to(root)}")
    return KINDS[kind](_clean(path))


def _clean(path: Path) -> Sequence[Outcome]:
    """The results of a file. Raises UsageError for one that was measured from no clean commit."""
    outcomes = find_run(path).outcomes
    for outcome in outcomes:
        environment = outcome.result.environment if outcome.result else None
        if environment is None or not environment.commit or environment.commit.endswith(DIRTY):
            commit = environment.commit if environment and environment.commit else "no commit"
            raise UsageError(f"{path.name}: {outcome.planned.name} was measured at {commit}, not at a clean commit")
    return outcomes


def differences(root: Path) -> Iterator[str]:
    """The documents that do not match the result files or the types, one line each.

    Raises UsageError as `documents` does.
    """
    for path, text in documents(root).items():
        if path.read_text(encoding="utf-8") != text:
            yield f"{path.relative_to(root)} is not what its result files or types give"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where something differs")
    args = parser.parse_args()
    try:
        if args.check:
            found = list(differences(ROOT))
            print("\n".join([*found, "run python -m docs.tables"] if found else ["nothing differs"]))
            return 1 if found else 0
        for path, text in documents(ROOT).items():
            path.write_text(text, encoding="utf-8")
    except RefitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
