"""A collection: many results in one file, one per line (JSON Lines), as small as they can be kept in a repository.

Each line is a result file's content, times in whole nanoseconds, without what belongs to one machine alone: host name,
folders, Slurm job.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from refit.errors import UsageError
from refit.results.reading import MAX_FILE_BYTES, UnreadableFile, check_bounds
from refit.results.result import Result, decoded_result, encoded, replace_text
from refit.results.sweep import check_name

COLLECTION_SUFFIX = ".jsonl"

OUTPUT_OPTION = re.compile(r" --output-dir(=| )('[^']*'|\S+)")
"""In a recorded command, which is quoted by shlex."""


def write_collection(path: Path, results: Iterable[Result]) -> None:
    """Replace a file by these results, in one step."""
    contents = (_rounded(json.loads(encoded(portable(result)))) for result in results)
    replace_text(path, "\n".join(json.dumps(content, separators=(",", ":")) for content in contents))


def _rounded(value: Any) -> Any:
    """Every float with nine decimals: of seconds, nanoseconds."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 9) if isinstance(value, float) else value


def portable(result: Result) -> Result:
    """A result without host name, folders and Slurm job."""
    environment, scenario = result.environment, result.scenario
    if environment is not None:
        kept = environment.variables.items()
        variables = {name: value for name, value in kept if name != "SLURM_JOB_ID" and not value.startswith("/")}
        command = OUTPUT_OPTION.sub("", environment.command)
        environment = replace(environment, host=None, command=command, variables=variables)
    if scenario is not None:
        scenario = replace(scenario, output_dir=Path())
    return replace(result, environment=environment, scenario=scenario)


def read_collection(path: Path) -> list[Result]:
    """The results in a file, in its order. Raises UnreadableFile, which names the line that is no result."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
        results = [_read_line(number, line) for number, line in enumerate(lines, 1)]
        _check_names(results)
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read: {error.strerror}", "") from None
    except ValueError as error:
        raise UnreadableFile(path, f"is no collection of results ({error})", "write it again") from None
    return results


def _read_line(number: int, line: str) -> Result:
    try:
        content = json.loads(line)
        check_bounds(content)
        result = decoded_result(content)
        check_name(result.run_id, "run_id")
    except (ValueError, RecursionError, UsageError) as error:
        raise ValueError(f"line {number}: {error}") from None
    return result


def _check_names(results: list[Result]) -> None:
    if not results:
        raise ValueError("it is empty")
    counts = Counter(result.run_id for result in results)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"several results are called {twice[0]}")
