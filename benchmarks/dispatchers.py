"""Token dispatchers and the whole cycle on the GPUs of one host, with Kimi K2's widths: one command, resumable.

    python -m benchmarks.dispatchers --num-gpus 4 --budget-minutes 25 --output-dir dispatcher_results

Every run is a process group of its own and writes one small result file; one that is there and ok is not run again.
The runs that say most come first, so that a budget cut short leaves a table; the next call goes on with the others.
`--cpu` runs the same list with the tiny model on CPU ranks, as a rehearsal; `--list` prints it with the memory that
each run needs. Layers of Transformer Engine are run too where it is installed.

At the end the report is printed and `tables/` has the index and the loss curves. `gpu<N>_dispatchers.jsonl` holds all
results: copied to docs/results, it is what `benchmarks.results_docs` makes the table of docs/performance.md from.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from refit.cli.parsing import parse
from refit.errors import UnavailableError, UsageError
from refit.models.megatron import nccl_ep
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.results.collection import COLLECTION_SUFFIX, write_collection
from refit.results.result import Result, read_result
from refit.results.status import Status

WIDTHS = ["--model=kimi_k2", "--num-layers=4", "--moe-layer-freq=([0]*1+[1]*3)"]
WIDTHS += ["--moe-grouped-gemm", "--moe-router-dtype=fp32", "--moe-router-force-load-balancing", "--seq-length=4096"]
TINY = ["--model=tiny", "--moe-router-dtype=fp32", "--moe-router-force-load-balancing", "--seq-length=32"]
EXPERTS_PER_GPU = 16
ARMS = ("alltoall", "allgather")
NCCL_EP = ("flex", "--moe-flex-dispatcher-backend=ncclep", "--moe-expert-rank-capacity-factor=1.5")
"""A further arm of Transformer Engine's layers, where it has NCCL EP, and its flags."""

IMPLEMENTATIONS = {"local": "", "transformer_engine": "TE_"}
"""Layers of Megatron-Core, and what names of runs with them begin with."""

OVERLAP, DELAY = "--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"

ENDING_S = 30
"""Seconds that a run has to end its ranks when its time is up."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run: its name, which is that of its result file, and its flags."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Campaign:
    """What all runs share. `micro_batches` come in the order of their importance. `tp` is that of the second layout, 1
    for none."""

    num_gpus: int
    micro_batches: tuple[int, ...] = (1, 4, 2)
    tp: int = 2
    implementations: tuple[str, ...] = ("local",)
    has_nccl_ep: bool = False
    cpu: bool = False

    @property
    def layouts(self) -> dict[str, list[str]]:
        """Experts over all GPUs, then over those that TP leaves."""
        found = {f"EP{self.num_gpus}": [f"--expert-model-parallel-size={self.num_gpus}"]}
        if self.tp > 1:
            rest = self.num_gpus // self.tp
            sizes = [f"--tensor-model-parallel-size={self.tp}", f"--expert-model-parallel-size={rest}"]
            etp = ["--expert-tensor-parallel-size=1"] if rest > 1 else []
            found[f"TP{self.tp}_EP{rest}"] = [*sizes, "--sequence-parallel", *etp]
        return found

    def cases(self) -> Iterator[Case]:
        """Both arms of each cell: all layouts and layers at the first two micro-batches, then the cycle, overlap, and
        the other micro-batches."""
        first, others = self.micro_batches[:2], self.micro_batches[2:]
        yield from self._cells(first)
        yield self._cycle()
        if not self.cpu:
            yield from self._overlapped()
        yield from self._cells(others)

    def _cells(self, micro_batches: Sequence[int]) -> Iterator[Case]:
        for impl, (layout, sizes), micro in itertools.product(
            self.implementations, self.layouts.items(), micro_batches
        ):
            flex = self.has_nccl_ep and impl == "transformer_engine"
            for arm, *flags in (*((arm,) for arm in ARMS), *[NCCL_EP] * flex):
                name = f"{IMPLEMENTATIONS[impl]}{layout}_mb{micro}_{arm}"
                yield Case(name, (*self._common(impl, micro, arm), *flags, *sizes, "--measure=train-step"))

    def _overlapped(self) -> Iterator[Case]:
        """The first cell's first arm with its exchange hidden, and with weight gradients moved behind it as well."""
        layout, sizes = next(iter(self.layouts.items()))
        for impl in self.implementations:
            flags = (*self._common(impl, self.micro_batches[0], ARMS[0]), *sizes, "--measure=train-step", OVERLAP)
            name = f"{IMPLEMENTATIONS[impl]}{layout}_mb{self.micro_batches[0]}_{ARMS[0]}_overlap"
            yield Case(name, flags)
            if impl == "transformer_engine":
                yield Case(f"{name}_delayed", (*flags, DELAY))

    def _cycle(self) -> Case:
        measured = ["--measure=train-step,refit,forward", "--refit-mode=collocated", "--check-forward"]
        measured += [f"--rl-inference-tensor-model-parallel-size={self.num_gpus}"]
        sizes = [f"--expert-model-parallel-size={self.num_gpus}", "--rl-inference-expert-model-parallel-size=1"]
        return Case("cycle", (*self._common(self.implementations[0], 1, ARMS[0]), *sizes, *measured))

    def _common(self, impl: str, micro: int, arm: str) -> list[str]:
        return [
            *(TINY if self.cpu else [*WIDTHS, f"--num-experts={EXPERTS_PER_GPU * self.num_gpus}"]),
            f"--transformer-impl={impl}",
            f"--refit-method={'gloo' if self.cpu else 'nccl'}",
            f"--global-batch-size={max(self.micro_batches) * self.num_gpus}",
            f"--micro-batch-size={micro}",
            f"--moe-token-dispatcher-type={arm}",
        ]


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


def run(case: Case, output_dir: Path, steps: list[str], budget: Budget) -> None:
    """Run a case within the budget. What it prints goes to `<name>.log`."""
    path = output_dir / f"{case.name}.json"
    if path.exists():  # a run that failed is kept under another name
        path.replace(output_dir / f"{case.name}.{sum(1 for _ in output_dir.glob(f'{case.name}*'))}.failed")
    words = [*case.flags, *steps, f"--output-dir={output_dir}", f"--run-name={case.name}"]
    begin_s = time.monotonic()
    with (output_dir / f"{case.name}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "refit", "run", *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(budget.left_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
    taken_s = time.monotonic() - begin_s
    budget.slowest_s = max(budget.slowest_s, taken_s)
    print(f"{case.name}: exit code {process.returncode}, {taken_s:.0f} s", flush=True)


def run_all(cases: Sequence[Case], output_dir: Path, steps: list[str], budget: Budget) -> None:
    """Run the cases that have no result yet, as far as the budget goes."""
    for case in cases:
        if _is_ok(result_of(case, output_dir)):
            print(f"{case.name}: there already")
        elif budget.allows_another:
            run(case, output_dir, steps, budget)
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


def _has_nccl_ep() -> bool:
    try:
        nccl_ep.check_available()
    except UnavailableError as error:
        print(error)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=4, help="GPUs of this host; default: 4")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 2], help="default: 1 4 2")
    parser.add_argument("--tp", type=int, default=2, help="TP of the second layout, 1 for none; default: 2")
    parser.add_argument("--num-steps", type=int, default=20, help="timed steps; default: 20")
    parser.add_argument("--num-warmup", type=int, default=4, help="default: 4")
    parser.add_argument("--budget-minutes", type=float, help="time for all runs; default: no limit")
    parser.add_argument("--cpu", action="store_true", help="the tiny model on CPU ranks")
    parser.add_argument("--list", action="store_true", help="print the runs and their memory, and stop")
    parser.add_argument("--output-dir", type=Path, default=Path("dispatcher_results"))
    args = parser.parse_args()
    engine = not args.cpu and importlib.util.find_spec("transformer_engine") is not None
    implementations = tuple(IMPLEMENTATIONS) if engine else ("local",)
    campaign = Campaign(
        args.num_gpus, tuple(args.micro_batches), args.tp, implementations, engine and _has_nccl_ep(), args.cpu
    )
    cases = list(campaign.cases())
    if args.list:
        for case in cases:
            print(f"{case.name:<32} {memory_bytes(case, args.num_gpus) / 2**30:6.1f} GiB per GPU")
        return 0
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    steps = [f"--num-train-steps={args.num_steps}", f"--num-train-warmup={args.num_warmup}"]
    run_all(cases, folder, steps, Budget(args.budget_minutes and 60 * args.budget_minutes))
    machine = "cpu" if args.cpu else f"gpu{args.num_gpus}"
    keep(cases, folder, folder / f"{machine}_dispatchers{COLLECTION_SUFFIX}")
    subprocess.run([sys.executable, "-m", "refit", "report", str(folder), "--tables", str(folder / "tables")])
    subprocess.run([sys.executable, "-m", "refit", "plot", str(folder)])
    return 0 if all(_is_ok(result_of(case, folder)) for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
