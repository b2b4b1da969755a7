"""The loop over the scenarios of a sweep: each is started, waited for and closed, whatever became of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refit.errors import CANCELLED, RefitError, UsageError
from refit.launch.base import Job, Launcher
from refit.launch.host import CUT_SHORT, DISRUPTED, TIMED_OUT, Cancelled, Stop
from refit.launch.rank_logs import keep_rank_logs
from refit.predict import cpus
from refit.predict.dry_run import DryRunOptions
from refit.report.refits.sweep_table import outcome_lines
from refit.report.terminal.console import show, show_aside, show_text
from refit.results.plain import plain
from refit.results.sweep import Attempt, Planned, Sweep, attempts
from refit.sweep import check
from refit.sweep.close import Ending, close
from refit.sweep.run import Task, pending, task


@dataclass(frozen=True, slots=True)
class Loop:
    """What all scenarios of a sweep share. `timeout_s` 0: no limit. `on_cpus`: ranks run on this machine's CPUs."""

    sweep_file: Path
    launcher: Launcher
    stop: Stop
    timeout_s: int = 0
    on_cpus: bool = False

    @property
    def sweep(self) -> Sweep:
        return Sweep.read(self.sweep_file)

    @property
    def directory(self) -> Path:
        return Path(os.path.abspath(self.sweep_file)).parent

    def run(self, scenarios: Sequence[Planned]) -> int:
        """Run scenarios in turn. Returns the exit code of the last one's command. Raises as `each` does."""
        codes = [code for _, code in self.each(scenarios)]
        return codes[-1] if codes else 0

    def each(
        self, scenarios: Sequence[Planned], limit_s: Callable[[], int] | None = None
    ) -> Iterator[tuple[Planned, int]]:
        """Run scenarios in turn. Each comes with the exit code of its command before the next one starts.

        `limit_s` gives the time limit of the one that starts, in place of `timeout_s`.
        Raises Cancelled after a signal, with the attempt that ran closed.
        """
        sweep = self.sweep
        for number, planned in enumerate(scenarios, 1):
            self._check()
            one = self._next(sweep, planned)
            show(
                f"[{number}/{len(scenarios)}] {one.name}: {one.nodes} x {one.ranks_per_node} ranks, log: {one.stem}.log"
            )
            limited = self if limit_s is None else replace(self, timeout_s=limit_s())
            yield planned, limited._run(one, planned)
        self._check()

    def _next(self, sweep: Sweep, planned: Planned) -> Task:
        """The next attempt at a scenario, or the last one where what was started for it is still there."""
        made = attempts(self.directory, sweep.run_id, planned.name)
        if made and self.launcher.goes_on(made[-1]):
            return task(sweep, self.directory, planned, made[-1])
        return task(sweep, self.directory, planned)

    def _check(self) -> None:
        """Raise Cancelled where a signal came between scenarios."""
        if self.stop.told:
            show_aside("Cancelled")
            raise Cancelled("cancelled")

    def pending(self, which: str, name: str | None = None) -> list[Planned]:
        """The scenarios that are left to run; of these only `name`, where one is given."""
        found = pending(self.sweep, self.directory, which)
        return [planned for planned in found if name in (None, planned.name)]

    def _run(self, one: Task, planned: Planned) -> int:
        timeout_s = self.timeout_s
        job = one.job(timeout_s)
        log = Attempt(one.stem).log
        ending = None
        try:
            if self.on_cpus:
                job = on_cpus(job, log)
            words = self.launcher.command(job)
            code = self.launcher.host.run(words, log, 0 if self.launcher.keeps_time else timeout_s)
            # Slurm signals a step as well as this process, and it may have ended first.
            if self.stop.told or code == CUT_SHORT:
                raise Cancelled("cancelled")
            timed_out_s = float(timeout_s) if code == TIMED_OUT and timeout_s else None
            ending = Ending(code, timed_out_s, cancelled=code == DISRUPTED)
        except Cancelled:
            show_aside(f"Cancelled during {one.name}")
            ending = Ending(CANCELLED, cancelled=True)
            raise
        except _CannotRun as error:
            ending = Ending(error.exit_code)
        finally:
            if ending is not None:
                show_text(outcome_lines(planned, close(Attempt(one.stem), ending)))
                keep_rank_logs(job, ending.exit_code)
        return ending.exit_code


class _CannotRun(RefitError):
    """The scenario cannot run on these CPUs; its log says why."""

    def __init__(self, error: RefitError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


def on_cpus(job: Job, log: Path) -> Job:
    """`job` with stand-ins for what needs a GPU, which a line of the log says. Raises _CannotRun."""
    try:
        flags, note = check.on_cpus(job.flags)
        machine = cpus.this_machine()
        scenario, _ = check.checked(flags, DryRunOptions(None, cpus.most_cpu_ranks(machine), None), machine)
    except RefitError as error:
        _append(log, f"error: {plain(str(error))}")
        raise _CannotRun(error) from None
    _append(log, f"# note: {note}" if note else "")
    placement = check.place(scenario.num_ranks, None, scenario.ranks_per_gpu)
    return replace(job, nodes=placement.nodes, ranks_per_node=placement.ranks_per_node, flags=tuple(flags))


def _append(log: Path, line: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def name_of_task(names: Sequence[str], number: int) -> str:
    """The scenario of job `number` of an array. Raises UsageError where there is none."""
    if number >= len(names):
        raise UsageError(f"task {number} of an array of {len(names)} scenarios")
    return names[number]
