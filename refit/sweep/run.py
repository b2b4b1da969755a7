"""Begins and resumes a sweep, and lists the scenarios that are still to run."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from refit.config.clusters import load_cluster
from refit.config.limits import MAX_SCENARIOS
from refit.errors import UsageError
from refit.launch.base import Job
from refit.predict.cpus import Machine
from refit.predict.dry_run import DryRunOptions
from refit.results.identity import foreign
from refit.results.result import CANCELLED
from refit.results.status import Status
from refit.results.sweep import SWEEP_SUFFIX, Attempt, Planned, Sweep, check_name, last_result, next_attempt, sweep_file
from refit.sweep.check import check
from refit.sweep.parallel import plan_all
from refit.sweep.selection import Candidate, Selection

UNFINISHED = (None, Status.RUNNING)
DONE = (Status.OK, Status.WAIVED)
"""Outcomes that `--only failed` and a resumed sweep leave as they are."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The GPUs a sweep may use, and their cluster. `num_gpus` None: as many as each scenario needs.

    `machine` is the one whose CPUs take the ranks where it has no GPU, otherwise None.
    """

    num_gpus: int | None
    gpus_per_node: int
    cluster: str | None
    machine: Machine | None = None

    @property
    def options(self) -> DryRunOptions:
        """Raises UsageError for an unknown cluster."""
        return DryRunOptions(self.num_gpus, self.gpus_per_node, load_cluster(self.cluster) if self.cluster else None)


def plan(selection: Selection, allocation: Allocation, run_id: str = "", jobs: Sequence[str] = ()) -> Sweep:
    """Check every scenario of a selection.

    Raises UsageError for an unknown cluster, if all are skipped, and for more than MAX_SCENARIOS with all runs.
    """
    if (total := len(selection.candidates) * selection.num_runs) > MAX_SCENARIOS:
        raise UsageError(
            f"{len(selection.candidates)} scenarios x {selection.num_runs} runs = {total:,}, {MAX_SCENARIOS} are the "
            "most: lower --num-runs"
        )
    scenarios = tuple(plan_all(selection.candidates, _check(allocation)))
    if all(planned.status is Status.SKIPPED for planned in scenarios):
        raise UsageError(f"all {len(scenarios)} scenarios are skipped, {scenarios[0].name}: {scenarios[0].reason}")
    num_gpus = allocation.num_gpus or max(planned.num_gpus for planned in scenarios)
    return Sweep(
        run_id=run_id,
        title=selection.title,
        date=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        jobs=tuple(jobs),
        nodes=math.ceil(num_gpus / allocation.gpus_per_node),
        num_gpus=num_gpus,
        gpus_per_node=allocation.gpus_per_node,
        cluster=allocation.cluster,
        scenarios=interleaved(scenarios, selection.num_runs),
    )


def _check(allocation: Allocation) -> Callable[[Candidate], Planned]:
    return functools.partial(check, options=allocation.options, machine=allocation.machine)


def interleaved(scenarios: Sequence[Planned], num_runs: int) -> tuple[Planned, ...]:
    """Runs of each scenario that is ready, A_run1 B_run1 A_run2 B_run2, so that slow changes of a machine meet all.

    Scenarios that are refused or skipped are listed once. Raises UsageError for a name that is taken or too long.
    """
    if num_runs == 1:
        return tuple(scenarios)
    found = [planned for planned in scenarios if planned.status is not Status.READY]
    taken = {planned.name for planned in found}
    for number in range(1, num_runs + 1):
        for planned in scenarios:
            if planned.status is not Status.READY:
                continue
            name = f"{planned.name}_run{number}"
            check_name(name, "name")
            if name in taken:
                raise UsageError(f"name {name!r} of run {number} of {planned.name!r} is taken: rename that scenario")
            taken.add(name)
            found.append(replace(planned, name=name, run_of=planned.name))
    return tuple(found)


def misplaced(sweep: Sweep, directory: Path) -> list[str]:
    """A line for each scenario whose last result is of another one; such a scenario is run again."""
    found = []
    for planned in sweep.scenarios:
        result = last_result(directory, sweep.run_id, planned.name)
        if result is not None and (reason := foreign(planned, result)):
            found.append(f"{planned.name}: {reason}: it runs again")
    return found


def begin(selection: Selection, allocation: Allocation, directory: Path, run_id: str | None, job: str | None) -> Path:
    """Plan a sweep, write its file and return the path. `run_id` None: the local time and the job.

    Raises UsageError where `run_id` is taken, since results are never overwritten.
    """
    jobs = [job] if job else []
    name = run_id or "_".join([f"{datetime.now():%Y%m%d-%H%M%S}", *jobs])
    check_name(name, "run id")
    sweep, number = plan(selection, allocation, name, jobs), 1
    directory.mkdir(parents=True, exist_ok=True)
    while not _reserve(path := sweep_file(directory, sweep.run_id)):
        if run_id:
            raise UsageError(f"{path} is there already: continue it with --resume {run_id}, or choose another --run-id")
        number += 1
        sweep = replace(sweep, run_id=f"{name}-{number}")
    sweep.write(path)
    return path


def _reserve(path: Path) -> bool:
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def find(directory: Path, run_id: str) -> Sweep:
    """The earlier sweep `run_id`. Raises UsageError, with the sweeps there are, for an unknown one."""
    path = sweep_file(directory, run_id)
    if not path.exists():
        known = ", ".join(sorted(file.name.removesuffix(SWEEP_SUFFIX) for file in directory.glob(f"*{SWEEP_SUFFIX}")))
        raise UsageError(f"no sweep {run_id!r} in {directory}: there {f'are {known}' if known else 'is none'}")
    return Sweep.read(path)


def resume(sweep: Sweep, directory: Path, allocation: Allocation, job: str | None) -> Path:
    """Check all scenarios that are not DONE against this allocation, add the job, write the file, return its path."""
    num_gpus = allocation.num_gpus or sweep.num_gpus
    again = [planned for planned in sweep.scenarios if _status(directory, sweep.run_id, planned) not in DONE]
    # A skipped one still counts as a cell of an axis.
    candidates = [Candidate(each.name, each.flags, is_cell=each.status is Status.SKIPPED) for each in again]
    found = zip(again, plan_all(candidates, _check(allocation)), strict=True)
    checked = {before.name: replace(planned, run_of=before.run_of) for before, planned in found}
    path = sweep_file(directory, sweep.run_id)
    replace(
        sweep,
        jobs=(*sweep.jobs, job) if job and job not in sweep.jobs else sweep.jobs,
        nodes=math.ceil(num_gpus / allocation.gpus_per_node),
        num_gpus=num_gpus,
        gpus_per_node=allocation.gpus_per_node,
        cluster=allocation.cluster,
        scenarios=tuple(checked.get(planned.name, planned) for planned in sweep.scenarios),
    ).write(path)
    return path


def add_job(sweep: Sweep, directory: Path, job: str) -> Path:
    """Say in the sweep's file that this job runs it too. Returns the path."""
    path = sweep_file(directory, sweep.run_id)
    replace(sweep, jobs=tuple(dict.fromkeys([*sweep.jobs, job]))).write(path)
    return path


def pending(sweep: Sweep, directory: Path, which: str = "unfinished") -> list[Planned]:
    """The scenarios to run now. `which`: `unfinished` (no finished result) or `failed` (last attempt not in DONE).

    Refused and skipped scenarios are never among them.
    """
    found = []
    for planned in sweep.scenarios:
        status = _status(directory, sweep.run_id, planned)
        wanted = {"unfinished": status in UNFINISHED, "failed": status not in DONE}[which]
        if wanted and planned.status is Status.READY:
            found.append(planned)
    return found


def _status(directory: Path, run_id: str, planned: Planned) -> Status | None:
    """The last attempt's status; None without an attempt, where it was cancelled or is of another scenario."""
    result = last_result(directory, run_id, planned.name)
    if result is None or (result.failure and result.failure.message == CANCELLED) or foreign(planned, result):
        return None
    return result.status


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt to start: its nodes and ranks, its flags, and `stem`, the path of its files without suffix."""

    name: str
    nodes: int
    ranks_per_node: int
    stem: Path
    flags: tuple[str, ...]
    run_id: str

    def job(self, timeout_s: int = 0) -> Job:
        """The ranks of this attempt, for a launcher."""
        return Job(self.nodes, self.ranks_per_node, self.stem, self.flags, self.run_id, timeout_s)


def task(sweep: Sweep, directory: Path, planned: Planned, attempt: Attempt | None = None) -> Task:
    """The next attempt at a scenario, whose stem is absolute and none of whose files exist; or `attempt`, once more."""
    attempt = attempt or next_attempt(Path(os.path.abspath(directory)), sweep.run_id, planned.name)
    stem = attempt.stem
    cluster = [f"--cluster={sweep.cluster}"] if sweep.cluster else []
    flags = (*planned.flags, *cluster, f"--output-dir={stem.parent}", f"--run-name={stem.name}")
    return Task(planned.name, planned.nodes, planned.ranks_per_node, stem, flags, sweep.run_id)
