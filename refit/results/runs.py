"""Finds a run on disk: a sweep by its file or folder, a collection, or single results outside a sweep."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from refit.errors import UsageError
from refit.results.collection import COLLECTION_SUFFIX, read_collection
from refit.results.outcomes import Outcome, judged, load_outcomes
from refit.results.reading import UnreadableFile
from refit.results.result import Environment, Result, read_result
from refit.results.status import Status
from refit.results.step import STEPS_SUFFIX
from refit.results.sweep import SWEEP_SUFFIX, Planned, Sweep, sweep_file


@dataclass(frozen=True, slots=True)
class Run:
    """A sweep and its outcomes. `is_sweep` is False where single results were combined into one.

    `skipped` are the damaged files that were passed over.
    """

    directory: Path
    sweep: Sweep
    outcomes: tuple[Outcome, ...]
    is_sweep: bool
    skipped: tuple[UnreadableFile, ...] = ()


def find_run(path: Path, run_id: str | None = None) -> Run:
    """The run at `path`: a sweep file, a collection, a result file, a folder of sweeps or results, or the folder above
    such a `logs` folder.

    Of several sweeps the latest is taken, unless `run_id` names one. A folder without sweeps gives all its results, or
    the one that `run_id` names. Damaged files are passed over (`Run.skipped`). Raises UsageError where there is no run,
    or no readable one.
    """
    if not _exists(path):
        raise UsageError(f"{path} does not exist: give a folder of results, a sweep file or a result file")
    if path.is_file():
        run = _run_in(path)
        if run_id not in (None, run.sweep.run_id):
            raise UsageError(f"{path} is run {run.sweep.run_id}, not {run_id}: give its folder, or leave --run-id out")
        return run
    folders = [path, path / "logs"]
    for folder in folders:
        if found := _files(folder, f"*{SWEEP_SUFFIX}"):
            return _latest(found) if run_id is None else _sweep_run(_chosen(folder, found, run_id))
    for folder in folders:
        if found := [file for file in _files(folder, "*.json") if run_id in (None, file.stem)]:
            return _single_results(folder, found)
    wanted = f"no result {run_id}.json" if run_id else "no results"
    raise UsageError(f"{path} holds {wanted}: give the folder that a run's --output-dir named, or its logs folder")


def _run_in(path: Path) -> Run:
    """The run in a sweep file, a collection or a result file."""
    if path.name.endswith(SWEEP_SUFFIX):
        return _sweep_run(path)
    if path.suffix == COLLECTION_SUFFIX:
        return _combined(path.parent, path.stem, {result.run_id: result for result in read_collection(path)})
    return _single_results(path.parent, [path])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern)) if path.is_file()]


def _latest(found: list[Path]) -> Run:
    """The sweep begun last, of those that can be read."""
    dates: dict[Path, str] = {}
    skipped = []
    for path in found:
        try:
            dates[path] = Sweep.read(path).date
        except UnreadableFile as error:
            skipped.append(error)
    if not dates:
        raise _none_readable(skipped)
    run = _sweep_run(max(dates, key=lambda path: (dates[path], path.name)))
    return replace(run, skipped=(*skipped, *run.skipped))


def _none_readable(skipped: list[UnreadableFile]) -> UsageError:
    if len(skipped) == 1:
        return skipped[0]
    listed = "; ".join(f"{error.path}: {error.reason}" for error in skipped[:10])
    return UsageError(f"none of {len(skipped)} files can be read: {listed}")


def _chosen(folder: Path, found: list[Path], run_id: str) -> Path:
    if sweep_file(folder, run_id) in found:
        return sweep_file(folder, run_id)
    ids = ", ".join(path.name.removesuffix(SWEEP_SUFFIX) for path in found)
    raise UsageError(f"{folder} holds no run {run_id!r}: there are {ids}")


def _sweep_run(path: Path) -> Run:
    sweep = Sweep.read(path)
    outcomes = tuple(load_outcomes(sweep, path.parent))
    skipped = tuple(outcome.unreadable for outcome in outcomes if outcome.unreadable)
    return Run(path.parent, sweep, outcomes, is_sweep=True, skipped=skipped)


def _single_results(folder: Path, paths: list[Path]) -> Run:
    """Result files side by side, as a run named after its only result or its folder."""
    named: dict[str, Result] = {}
    skipped = []
    for path in paths:
        try:
            named[path.stem] = read_result(path)
        except UnreadableFile as error:
            if not path.name.endswith(STEPS_SUFFIX):
                skipped.append(error)
    if not named:
        raise _none_readable(skipped)
    run_id = paths[0].stem if len(paths) == 1 else folder.resolve().name
    return replace(_combined(folder, run_id, named), skipped=tuple(skipped))


def _combined(folder: Path, run_id: str, named: dict[str, Result]) -> Run:
    """Results by name as a sweep without a title, oldest first."""
    started = dict(sorted(named.items(), key=lambda item: (item[1].started or "", item[0])))
    outcomes = tuple(outcome_of(name, result) for name, result in started.items())
    planned = [outcome.planned for outcome in outcomes]
    jobs = dict.fromkeys(job for result in started.values() if (job := result.variables.get("SLURM_JOB_ID")))
    sweep = Sweep(
        run_id=run_id,
        title="",
        date=next(reversed(started.values())).started or "unknown",
        jobs=tuple(jobs),
        nodes=max(entry.nodes for entry in planned),
        num_gpus=max(entry.num_gpus for entry in planned),
        gpus_per_node=max(entry.ranks_per_node for entry in planned),
        cluster=None,
        scenarios=tuple(planned),
    )
    return Run(folder, sweep, outcomes, is_sweep=False)


def outcome_of(name: str, result: Result) -> Outcome:
    """The outcome of a single result, which no sweep planned."""
    return judged(_planned(name, result), result)


def _planned(name: str, result: Result) -> Planned:
    """The scenario that a result is of."""
    scenario, environment = result.scenario, result.environment or Environment()
    num_ranks = scenario.num_ranks if scenario else 0
    per_node = len(environment.gpus) * (scenario.ranks_per_gpu if scenario else 1) or max(num_ranks, 1)
    return Planned(
        name=name,
        flags=_flags(environment.command),
        source=scenario.source if scenario else None,
        destination=scenario.destination if scenario else None,
        mode=scenario.mode.value if scenario else "unknown",
        method=scenario.method if scenario else "unknown",
        num_ranks=num_ranks,
        nodes=math.ceil(num_ranks / per_node),
        ranks_per_node=min(per_node, max(num_ranks, 1)),
        status=Status.READY,
        scenario=scenario,
    )


def _flags(command: str) -> tuple[str, ...]:
    """The flags of a command line; none where its quotes do not match."""
    try:
        return tuple(shlex.split(command)[1:])
    except ValueError:
        return ()
