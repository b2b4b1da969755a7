"""Runs a list of scenarios on this machine with the loop of `refit sweep run`: its checks, logs and signals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from refit.config.registry import LAUNCHERS, load
from refit.errors import CANCELLED, RefitError
from refit.launch.host import Cancelled, Stop, ThisProcess
from refit.predict import cpus
from refit.report.terminal.console import show_error
from refit.results.result import Failure, Result, now
from refit.results.status import Status
from refit.results.sweep import Planned, last_result, sweep_file
from refit.sweep.lock import hold
from refit.sweep.loop import Loop
from refit.sweep.run import Allocation, begin, plan
from refit.sweep.selection import Selection


@contextmanager
def opened(
    selection: Selection, directory: Path, *, num_gpus: int | None, run_id: str | None = None, timeout_s: int = 0
) -> Iterator[Loop]:
    """The loop over a list, whose files are in `directory`. `num_gpus` None: on CPUs; `timeout_s` 0: no limit.

    A `run_id` that is there goes on: what has a result of the same scenario is not pending any more. None begins a run
    named by the time. SIGTERM, SIGINT and an error end this process, in order and with its exit code.
    """
    machine = cpus.this_machine() if num_gpus is None else None
    allocation = Allocation(num_gpus, num_gpus or cpus.most_cpu_ranks(machine), None, machine)
    stop = Stop()
    host = ThisProcess(stop)
    launcher = load(LAUNCHERS["local"].launcher)(host, os.environ)
    with stop.on_signals():
        try:
            if run_id is None:
                file = begin(selection, allocation, directory, None, None)
            else:
                file = sweep_file(directory, run_id)
            directory.mkdir(parents=True, exist_ok=True)
            with hold(f"run {file.stem}", "exclusive", file.with_suffix(".lock"), host):
                if run_id is not None:
                    plan(selection, allocation, run_id).write(file)
                yield Loop(file, launcher, stop, timeout_s, on_cpus=num_gpus is None)
        except Cancelled:
            raise SystemExit(CANCELLED) from None
        except RefitError as error:
            show_error(str(error))
            raise SystemExit(int(error.exit_code)) from None


def write_list(selection: Selection, path: Path) -> None:
    """Write a list as YAML for `refit sweep run --scenarios PATH`, which runs it in a Slurm allocation too."""
    scenarios = [{"name": one.name, **by_name(one.flags)} for one in selection.candidates]
    text = yaml.safe_dump({"title": selection.title, "scenarios": scenarios}, sort_keys=False, width=120)
    path.write_text(text, encoding="utf-8")
    print(f"{len(scenarios)} scenarios: {path}")


def by_name(flags: Sequence[str]) -> dict[str, object]:
    """Flags by name without dashes, as lists of scenarios have them; of one that is given twice, the last."""
    found: dict[str, object] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name, is_whole, value = word[2:].partition("=")
            found[name] = value if is_whole else True
        else:
            found[name] = word
    return found


def result_of(planned: Planned, directory: Path, run_id: str) -> Result:
    """The result of its last attempt; a failed one where it was refused, or wrote none that can be read."""
    found = last_result(directory, run_id, planned.name)
    if found is not None:
        return found
    failure = Failure(planned.reason or "it has no result that can be read: see its log")
    return Result(planned.name, status=Status.FAILED, failure=failure, started=now(), scenario=planned.scenario)
