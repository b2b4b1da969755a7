"""A campaign: a list of scenarios on one host, run by the loop of `refit sweep run` within a budget of time.

Every run writes one small result file; one that is there and ok, of the same scenario, is not run again.
The cases come in the order of their importance, so that a budget cut short leaves the first; the next call goes on with
the others. At the end the report is printed and `tables/` has the index and the loss curves.
`<MACHINE>_<NAME>.jsonl` holds all results that are ok, for docs/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.listed import opened, write_list
from refit.cli.parsing import parse
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.results.collection import COLLECTION_SUFFIX, write_collection
from refit.results.result import Result
from refit.results.status import Status
from refit.results.sweep import Planned, last_result
from refit.sweep.selection import Candidate, Selection

Case = Candidate
"""One run: its name, which its files have, and its flags."""


@dataclass(slots=True)
class Budget:
    """The time for all runs, from `start` on. A run begins while there is as much left as the slowest so far took."""

    seconds: float | None
    slowest_s: float = 0.0
    _begin_s: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """The first run may begin: what was planned and checked before does not count."""
        self._begin_s = time.monotonic()

    @property
    def left_s(self) -> float | None:
        """Seconds left, None for no limit."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self._begin_s)

    @property
    def limit_s(self) -> int:
        """The time limit of a run that starts now, 0 for none."""
        return 0 if self.left_s is None else max(1, round(self.left_s))

    @property
    def allows_another(self) -> bool:
        left_s = self.left_s
        return left_s is None or left_s > self.slowest_s


def selection(cases: Sequence[Case], steps: Sequence[str], name: str) -> Selection:
    """The list of a campaign: its cases with the flags that they share."""
    return Selection(name, tuple(replace(case, flags=(*case.flags, *steps)) for case in cases))


def run_all(
    cases: Sequence[Case], output_dir: Path, steps: Sequence[str], budget: Budget, name: str, num_gpus: int | None
) -> None:
    """Run the cases that have no result yet, as far as the budget goes, on `num_gpus` GPUs or on CPUs.

    All calls with this `name` are one run of `refit sweep run`, whose files are in `output_dir`.
    """
    with opened(selection(cases, steps, name), output_dir, num_gpus=num_gpus, run_id=name) as loop:
        pending, scenarios = loop.pending("failed"), loop.sweep.scenarios
        wanted, runs = {planned.name for planned in pending}, loop.each(pending, lambda: budget.limit_s)
        budget.start()
        for planned in scenarios:
            if planned.status is not Status.READY:
                print(f"{planned.name}: {planned.reason}", flush=True)
            elif planned.name not in wanted:
                print(f"{planned.name}: there already")
            elif budget.allows_another:
                _run(runs, planned, budget)
            else:
                print(f"{planned.name}: left for another call, the budget is used up", flush=True)


def _run(runs: Iterator[tuple[Planned, int]], planned: Planned, budget: Budget) -> None:
    """Run a case, which is the next of `runs`, within the budget."""
    begin_s = time.monotonic()
    _, code = next(runs)
    taken_s = time.monotonic() - begin_s
    budget.slowest_s = max(budget.slowest_s, taken_s)
    print(f"{planned.name}: exit code {code}, {taken_s:.0f} s", flush=True)


def result_of(case: Case, output_dir: Path, name: str) -> Result | None:
    """The result of the last attempt at a case; None without one that can be read."""
    return last_result(output_dir, name, case.name)


def _is_ok(result: Result | None) -> bool:
    return result is not None and result.status is Status.OK


def keep(cases: Sequence[Case], output_dir: Path, path: Path, name: str) -> None:
    """Write all results that are ok to a collection, in the order of the cases."""
    found = [(case.name, result) for case in cases if (result := result_of(case, output_dir, name)) and _is_ok(result)]
    if found:
        write_collection(path, [replace(result, run_id=case_name) for case_name, result in found])


def memory_bytes(case: Case, num_gpus: int) -> int:
    """What the fullest GPU needs for a case, by the estimate of a dry run."""
    return dry_run(parse([*case.flags, "--dry-run"]).scenario, DryRunOptions(num_gpus)).memory_bytes


def add_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """What `measure` reads of a command line."""
    parser.add_argument("--num-gpus", type=int, default=4, help="GPUs of this host; default: 4")
    parser.add_argument("--num-steps", type=int, default=20, help="timed steps; default: 20")
    parser.add_argument("--num-warmup", type=int, default=4, help="default: 4")
    parser.add_argument("--budget-minutes", type=float, help="time for all runs; default: no limit")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on CPU ranks")
    parser.add_argument(
        "--write-list", type=Path, metavar="FILE", help="write the runs for refit sweep run --scenarios FILE, and stop"
    )
    parser.add_argument("--list", action="store_true", help="print the runs and their memory, and stop")
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir), help=f"default: {output_dir}")


def measure(cases: Sequence[Case], args: argparse.Namespace, name: str) -> int:
    """List or run the cases, collect and report the results. Returns the exit code: 1 while a case has none."""
    if args.list:
        for case in cases:
            print(f"{case.name:<32} {memory_bytes(case, args.num_gpus) / 2**30:6.1f} GiB per GPU")
        return 0
    run_id = f"{'cpu' if args.cpu else f'gpu{args.num_gpus}'}_{name}"
    steps = [f"--num-train-steps={args.num_steps}", f"--num-train-warmup={args.num_warmup}"]
    if args.write_list is not None:
        write_list(selection(cases, steps, run_id), args.write_list)
        return 0
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    budget = Budget(None if args.budget_minutes is None else 60 * args.budget_minutes)
    run_all(cases, folder, steps, budget, run_id, None if args.cpu else args.num_gpus)
    keep(cases, folder, folder / f"{run_id}{COLLECTION_SUFFIX}", run_id)
    subprocess.run([sys.executable, "-m", "refit", "report", str(folder), "--tables", str(folder / "tables")])
    subprocess.run([sys.executable, "-m", "refit", "plot", str(folder)])
    return 0 if all(_is_ok(result_of(case, folder, run_id)) for case in cases) else 1
