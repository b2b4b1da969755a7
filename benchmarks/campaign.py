"""A campaign: runs on one host, one after another, within a budget of time and resumable.

Every run writes one small result file; one that is there and ok is not run again.
The cases come in the order of their importance, so that a budget cut short leaves the first; the next call goes on with
the others. At the end the report is printed and `tables/` has the index and the loss curves.
`<MACHINE>_<NAME>.jsonl` holds all results that are ok, for docs/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.ranks import Machine, this_machine
from refit.cli.parsing import parse
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.results.collection import COLLECTION_SUFFIX, write_collection
from refit.results.result import Result, read_result
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Case:
    """One run: its name, which is that of its result file, and its flags."""

    name: str
    flags: tuple[str, ...]


@dataclass(slots=True)
class Budget:
    """The time for all runs. A run begins while there is as much left as the slowest so far took."""

    seconds: float | None
    slowest_s: float = 0.0
    _begin_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float | None:
        """Seconds left, None for no limit."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self._begin_s)

    @property
    def allows_another(self) -> bool:
        left_s = self.left_s
        return left_s is None or left_s > self.slowest_s


def run(here: Machine, case: Case, output_dir: Path, steps: list[str], budget: Budget) -> None:
    """Run a case within the budget. What it prints goes to `<name>.log`."""
    path = output_dir / f"{case.name}.json"
    if path.exists():  # a run that failed is kept under another name
        path.replace(output_dir / f"{case.name}.{sum(1 for _ in output_dir.glob(f'{case.name}*'))}.failed")
    words = [*case.flags, *steps, f"--output-dir={output_dir}", f"--run-name={case.name}"]
    begin_s = time.monotonic()
    num_ranks = parse(words).scenario.num_ranks
    code = here.run(words, num_ranks, output_dir / f"{case.name}.log", budget.left_s)
    taken_s = time.monotonic() - begin_s
    budget.slowest_s = max(budget.slowest_s, taken_s)
    print(f"{case.name}: exit code {code}, {taken_s:.0f} s", flush=True)


def run_all(cases: Sequence[Case], output_dir: Path, steps: list[str], budget: Budget) -> None:
    """Run the cases that have no result yet, as far as the budget goes."""
    with this_machine() as here:
        for case in cases:
            if _is_ok(result_of(case, output_dir)):
                print(f"{case.name}: there already")
            elif budget.allows_another:
                run(here, case, output_dir, steps, budget)
            else:
                print(f"{case.name}: left for another call, the budget is used up", flush=True)


def result_of(case: Case, output_dir: Path) -> Result | None:
    """The result of a case; None without one that can be read."""
    path = output_dir / f"{case.name}.json"
    try:
        return read_result(path) if path.exists() else None
    except UsageError:
        return None


def _is_ok(result: Result | None) -> bool:
    return result is not None and result.status is Status.OK


def keep(cases: Sequence[Case], output_dir: Path, path: Path) -> None:
    """Write all results that are ok to a collection, in the order of the cases."""
    found = [(case.name, result) for case in cases if (result := result_of(case, output_dir)) and _is_ok(result)]
    if found:
        write_collection(path, [replace(result, run_id=name) for name, result in found])


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
    parser.add_argument("--list", action="store_true", help="print the runs and their memory, and stop")
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir), help=f"default: {output_dir}")


def measure(cases: Sequence[Case], args: argparse.Namespace, name: str) -> int:
    """List or run the cases, collect and report the results. Returns the exit code: 1 while a case has none."""
    if args.list:
        for case in cases:
            print(f"{case.name:<32} {memory_bytes(case, args.num_gpus) / 2**30:6.1f} GiB per GPU")
        return 0
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    steps = [f"--num-train-steps={args.num_steps}", f"--num-train-warmup={args.num_warmup}"]
    run_all(cases, folder, steps, Budget(args.budget_minutes and 60 * args.budget_minutes))
    machine = "cpu" if args.cpu else f"gpu{args.num_gpus}"
    keep(cases, folder, folder / f"{machine}_{name}{COLLECTION_SUFFIX}")
    subprocess.run([sys.executable, "-m", "refit", "report", str(folder), "--tables", str(folder / "tables")])
    subprocess.run([sys.executable, "-m", "refit", "plot", str(folder)])
    return 0 if all(_is_ok(result_of(case, folder)) for case in cases) else 1
