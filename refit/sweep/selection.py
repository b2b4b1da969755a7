"""The scenarios of a sweep, from CONFIGS lines or a YAML file, as complete command lines, not yet checked."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from refit.cli.flag_parser import FlagParser
from refit.cli.flags import full_parser
from refit.cli.parsing import read_flags
from refit.config import yaml_files
from refit.config.flag_names import SIZE_FLAGS
from refit.config.limits import MAX_SCENARIOS
from refit.config.registry import AUTO, METHODS
from refit.config.scenario import Mode
from refit.errors import UsageError
from refit.results.sweep import check_name

LINE_FIELDS = ("SRC_TP", "SRC_EP", "DST_TP", "DST_EP", "REFIT_MODE", "REFIT_METHOD", "DESCRIPTION")
LINE_SIZES = ("tp", "ep")
"""The sizes a line gives for each side, in this order."""

SWEEP_FLAGS = {
    "output-dir": "results lie beside the sweep file",
    "run-name": "results are named after the scenarios",
    "num-gpus": "give it to the sweep",
    "gpus-per-node": "give it to the sweep",
    "cluster": "give it to the sweep",
    "dry-run": "`refit sweep plan` plans without running",
}
"""Flags that only the sweep sets -> the reason or what to do instead."""

DEFAULT_TITLE = "MoE"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scenario to check. `is_cell` is True for a combination of axis values, False for a scenario written out."""

    name: str
    flags: tuple[str, ...]
    is_cell: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """The scenarios of a sweep, in order, under a title. `num_runs`: how often each is run."""

    title: str
    candidates: tuple[Candidate, ...]
    num_runs: int = 1


def select_lines(lines: Sequence[str], common: Sequence[str], title: str | None = None) -> Selection:
    """Scenarios from CONFIGS lines, each with the `common` flags in front of its own.

    Raises UsageError, naming the line and the field, for a malformed line, a name given twice, a flag that none takes
    or more than MAX_SCENARIOS lines.
    """
    entries = [
        _Entry(f"scenario line {number} {yaml_files.shortened(line)}", line) for number, line in enumerate(lines, 1)
    ]
    _check_number(len(entries), "the lines")
    return _select(entries, {}, common, title or DEFAULT_TITLE)


def select_file(name: str, common: Sequence[str], title: str | None = None) -> Selection:
    """Scenarios from a file of `configs/scenarios`, or the YAML file at path `name`.

    Keys: `title`, `defaults` (flags without dashes), `scenarios`: CONFIGS lines, or mappings with a `name` and flags,
    in which a list is an axis unless the flag itself takes several values. Flags of a scenario override the defaults.
    Raises UsageError, naming the file and the scenario, or for more than MAX_SCENARIOS, with axes multiplied out.
    """
    path = yaml_files.find("scenarios", name)
    content = yaml_files.read_mapping(path, "the list of them below `scenarios:`")
    unknown = sorted(content.keys() - {"title", "defaults", "scenarios"})
    if unknown:
        raise UsageError(
            f"{path}: unknown key {yaml_files.shortened(unknown[0])[1:-1]}: title, defaults and scenarios are known"
        )
    defaults, scenarios = content.get("defaults") or {}, content.get("scenarios")
    if not isinstance(defaults, dict):
        raise UsageError(f"{path}: defaults must hold `flag: value` lines, not {yaml_files.shortened(defaults)}")
    if isinstance(content.get("title"), list | dict):
        raise UsageError(f"{path}: title must be text, not {yaml_files.shortened(content['title'])}")
    if not isinstance(scenarios, list) or not scenarios:
        raise UsageError(f"{path}: scenarios must be a list of CONFIGS lines or of `name: ...` with flags")
    _check_number(len(scenarios), str(path))
    entries = [_Entry(f"{path}, scenario {number}", entry) for number, entry in enumerate(scenarios, 1)]
    return _select(entries, defaults, common, title or str(content.get("title") or path.stem))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A scenario as written, and its place in the input for messages."""

    where: str
    content: object


def _select(entries: Sequence[_Entry], defaults: Mapping[str, object], common: Sequence[str], title: str) -> Selection:
    parser = full_parser()
    _check_common(parser, common)
    seen: dict[str, str] = {}
    candidates: list[Candidate] = []
    grids: list[_Grid] = []
    for entry in entries:
        with _located(entry.where):
            grids.append(_grid(parser, entry.content, defaults))
    _check_number(sum(grid.num_cells for grid in grids), entries[0].where.partition(", scenario ")[0])
    for entry, grid in zip(entries, grids, strict=True):
        with _located(entry.where):
            found = _candidates(parser, grid, common)
        for candidate in found:
            if candidate.name in seen:
                where = entry.where if entry.where != seen[candidate.name] else f"{entry.where}, twice"
                raise UsageError(f"{where}: name {candidate.name!r} is taken by {seen[candidate.name]}: rename one")
            seen[candidate.name] = entry.where
        candidates += found
    return Selection(title, tuple(candidates))


def _check_common(parser: FlagParser, common: Sequence[str]) -> None:
    for word in common:
        key = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and key in SWEEP_FLAGS:
            raise UsageError(f"--{key} cannot be given to a sweep's scenarios: {SWEEP_FLAGS[key]}")
    parser.parse_flags(common)


def _check_number(num_scenarios: int, where: str) -> None:
    """Raise UsageError for more scenarios than MAX_SCENARIOS, before any is planned."""
    if num_scenarios > MAX_SCENARIOS:
        raise UsageError(
            f"{where}: {num_scenarios:,} scenarios with all axes multiplied out, {MAX_SCENARIOS} are the most: "
            "shorten an axis, or make several lists"
        )


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put `where` in front of a UsageError's message."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Grid:
    """One entry: its name, the flags it inherits and its own, and the values of each axis among them."""

    name: str
    inherited: dict[str, object]
    own: dict[str, object]
    axes: dict[str, list[object]]

    @property
    def num_cells(self) -> int:
        """Combinations of axis values; 1 without an axis."""
        return math.prod(map(len, self.axes.values()))


def _grid(parser: FlagParser, content: object, defaults: Mapping[str, object]) -> _Grid:
    name, own = _named_values(content)
    inherited = {key: value for key, value in defaults.items() if key not in own}
    axes = {key: axis for key, value in (inherited | own).items() if (axis := _axis(parser, key, value))}
    return _Grid(name, inherited, own, axes)


def _candidates(parser: FlagParser, grid: _Grid, common: Sequence[str]) -> list[Candidate]:
    """The scenarios of one entry: one for each combination of axis values."""
    found = []
    for values in itertools.product(*grid.axes.values()):
        cell = dict(zip(grid.axes, values, strict=True))
        front, back = (
            {key: cell.get(key, value) for key, value in flags.items()} for flags in (grid.inherited, grid.own)
        )
        flags = (*parser.words(front), *common, *parser.words(back))
        candidate = Candidate("_".join([grid.name, *map(_in_name, values)]), flags, is_cell=bool(grid.axes))
        _check(candidate)
        found.append(candidate)
    return found


def _named_values(content: object) -> tuple[str, dict[str, object]]:
    """The name and the flags of one entry."""
    if isinstance(content, str):
        return _line_values(content)
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise UsageError(f"must be a CONFIGS line or hold `name: ...` and flags, not {yaml_files.shortened(content)}")
    return content["name"], {str(key): value for key, value in content.items() if key != "name"}


def _in_name(value: object) -> str:
    """An axis value as part of a scenario's name."""
    return re.sub(r"[^A-Za-z0-9+=-]+", "-", str(value))


def _axis(parser: FlagParser, key: str, value: object) -> list[object]:
    """The values of an axis; empty for a flag with one value, or one that takes a list itself."""
    if key in SWEEP_FLAGS:
        raise UsageError(f"{key} cannot stand in a scenario: {SWEEP_FLAGS[key]}")
    if parser.takes_list(key) or not isinstance(value, list):
        return []
    if not value:
        raise UsageError(f"{key} is an empty list: an axis needs at least one value")
    return value


def _check(candidate: Candidate) -> None:
    """Raise UsageError for an invalid name or flag. Layout, model and number of GPUs are not checked."""
    check_name(candidate.name, "name")
    broken = next((word for word in candidate.flags if not word.isprintable()), None)
    if broken is not None:
        raise UsageError(f"{broken!r} holds a line break or another control character: remove it")
    read_flags(candidate.flags)


def _line_values(line: str) -> tuple[str, dict[str, object]]:
    """The fields of `SRC_TP:SRC_EP:DST_TP:DST_EP:REFIT_MODE:REFIT_METHOD:DESCRIPTION`, as a name and flags."""
    fields = [field.strip() for field in line.split(":")]
    if len(fields) != len(LINE_FIELDS):
        raise UsageError(f"{len(fields)} fields, {len(LINE_FIELDS)} are needed: {':'.join(LINE_FIELDS)}")
    for field, text in zip(LINE_FIELDS[:4], fields, strict=False):
        if not re.fullmatch(r"0{0,17}[1-9][0-9]{0,17}", text):
            raise UsageError(f"{field} must be a whole number from 1 up, not {yaml_files.shortened(text)}")
    mode, method, name = fields[4:]
    modes = [mode.value for mode in Mode]
    for field, text, allowed in (("REFIT_MODE", mode, modes), ("REFIT_METHOD", method, [*METHODS, AUTO])):
        if text not in allowed:
            raise UsageError(f"{field} must be {' or '.join(allowed)}, not {text!r}")
    check_name(name, "DESCRIPTION")
    names = [SIZE_FLAGS[size][place] for place in (0, 1) for size in LINE_SIZES]
    sizes = {flag: int(text) for flag, text in zip(names, fields, strict=False)}
    return name, {**sizes, "refit-mode": mode, "refit-method": method}
