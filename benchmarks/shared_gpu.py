"""Random layouts on ranks that share one GPU, all verified: formats, dtypes, modes, TP, PP, EP, ETP, DP, replicas.

    python -m benchmarks.shared_gpu                                    64 layouts of up to 8 ranks, on one GPU
    python -m benchmarks.shared_gpu --list                             what would run
    python -m benchmarks.shared_gpu --only 17                          one of them again
    python -m benchmarks.shared_gpu --device cpu --num-layouts 3 --num-ranks 4

One set of processes runs them one after another, since a layout takes a second and a start twenty. A layout on which a
process fails is recorded with what its ranks said, and new processes go on with the next.

`--output-dir` gets a log and a result per layout, and `gpu1_layouts.jsonl` with all of them (on CPUs
`cpu_layouts.jsonl`), in the form that docs/results keeps. The exit code is 1 where an element was wrong or a layout
failed, 4 where time ran out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.random_layouts import Layouts, coverage, random_layouts
from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.errors import CANCELLED
from refit.launch.host import Cancelled, Host, Stop, ThisProcess
from refit.report.refits.refit_lines import wrong_weights
from refit.results.collection import COLLECTION_SUFFIX, write_collection
from refit.results.result import Failure, Result, encoded, now, read_result
from refit.results.status import Status

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = "layouts.json"
CLOSE_GROUPS_EVERY = 8
"""Layouts. Each brings process groups of its own, of which a Gloo group keeps a thread and connections."""

MOST_IN_A_ROW = 4
"""Layouts that fail one after another before the rest is given up: the machine is at fault, not they."""

SHOWN_LINES = 40
"""Of the traceback of the rank that failed first."""


def flags_of(layouts: Layouts, device: str, num_ranks: int) -> list[str]:
    """All flags of one refit: the layouts, the method, and how often."""
    gpu = ["--refit-method=cuda-ipc", f"--ranks-per-gpu={num_ranks}"]
    method = gpu if device == "cuda" else ["--refit-method=shm"]
    return [
        *layouts.flags,
        *method,
        "--num-benchmark-warmup=1",
        "--num-benchmark-iterations=2",
        "--timeout=60",
        "--staging-mib=64",
    ]


# --- Ranks -----------------------------------------------------------------------------------------------------------


def work(directory: Path, first: int, device_type: str, deadline_s: float) -> None:
    """Run the layouts from number `first` on, as a process of torchrun. Rank 0 writes `<name>.json`, prints a line."""
    import torch
    import torch.distributed as dist

    from refit.bench.runner import benchmark
    from refit.bench.session import new_session
    from refit.copies.batch import start_loading_kernels
    from refit.models.process_groups import group_cache

    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        start_loading_kernels()
    dist.init_process_group("cpu:gloo,cuda:gloo" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=90))
    rank = dist.get_rank()
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=90))
    assert isinstance(control, dist.ProcessGroup)
    listed = [Layouts(name, tuple(flags)) for name, flags in json.loads((directory / LAYOUTS).read_text())]
    session: Any = None
    for done, layouts in enumerate(listed[first:], 1):
        if _is_over(deadline_s, control):
            break
        phases = ["parse"]
        begin_s = time.monotonic()
        try:
            scenario = parse(layouts.flags).scenario
            session = replace(session, scenario=scenario) if session else new_session(scenario, device, control)
            session = replace(session, on_phase=phases.append)
            log = directory / f"{layouts.name}.log" if rank == 0 else Path(os.devnull)
            with log.open("w") as file, contextlib.redirect_stdout(file):
                result = benchmark(session)
        except BaseException:
            _tell(directory, layouts.name, rank, phases[-1])
            os._exit(1)  # at once: the others wait for this rank in a collective, and notice that it has gone
        if rank == 0:
            result = _on_its_own(result, layouts.name)
            (directory / f"{layouts.name}.json").write_text(encoded(result))
            print(row(result, time.monotonic() - begin_s), flush=True)
        del result
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        if done % CLOSE_GROUPS_EVERY == 0:
            group_cache().close()
    dist.barrier(control)
    sys.stdout.flush()
    os._exit(0)  # what libraries do at exit with many closed groups is not what is tested


def _on_its_own(result: Result, name: str) -> Result:
    """`result` under its name, without the times of a start, which only the first layout of a process has."""
    refit = result.refit
    assert refit is not None
    return replace(result, run_id=name, measurements={"refit": replace(refit, start_s={})})


def _is_over(deadline_s: float, control: Any) -> bool:
    """Whether no time is left, by rank 0's clock."""
    import torch.distributed as dist

    decided = [time.monotonic() > deadline_s]
    dist.broadcast_object_list(decided, group=control)
    return decided[0]


def _tell(directory: Path, name: str, rank: int, phase: str) -> None:
    """Leave what this rank knows of its failure. The first to fail has the lowest time."""
    text = f"{time.time():.6f}\n{phase}\n{traceback.format_exc()}"
    (directory / f"{name}.rank{rank}.err").write_text(text)


# --- The process that starts them ------------------------------------------------------------------------------------


def row(result: Result, seconds: float | None = None) -> str:
    """One line: layouts, median, elements compared and wrong; what went wrong on lines below it."""
    name, tested = result.run_id, result.refit.tested if result.refit else None
    if tested is None or result.failure is not None:
        failure = result.failure
        where = f" on rank {failure.rank} in phase '{failure.phase}'" if failure and failure.phase else ""
        return f"{name:<72} {result.status.text.upper()}{where}: {failure.message if failure else '-'}"
    if tested.median_s is None:
        return f"{name:<72} {tested.status.text.upper()}: {tested.reason}"
    took = f", {seconds:.1f} s" if seconds is not None else ""
    line = (
        f"{name:<72} {1e3 * tested.median_s:8.2f} ms, {tested.num_compared:>13,} elements compared, "
        f"{tested.num_wrong:,} wrong{took}{'' if tested.doubt is None else f'  {tested.doubt}'}"
    )
    return "\n".join(filter(None, [line, wrong_weights("refit", tested)]))


def is_right(result: Result) -> bool:
    """Whether every element was moved, compared and equal."""
    return bool(result.status is Status.OK and result.refit and result.refit.tested and not result.refit.tested.doubt)


def failed(directory: Path, layouts: Layouts, scenario: Scenario, log: Path, num_ranks: int) -> tuple[Result, str]:
    """The result of a layout on which one of `num_ranks` processes failed, and what they said, for the terminal."""
    told = {path: path.read_text().split("\n", 2) for path in directory.glob(f"{layouts.name}.rank*.err")}
    ranks = {int(path.stem.rpartition("rank")[2]): text for path, text in told.items()}
    if not ranks:
        tail = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        failure, shown = Failure(f"its processes ended without a word: see {log.name}"), tail
    else:
        first = min(ranks, key=lambda rank: float(ranks[rank][0]))
        lines = ranks[first][2].strip().splitlines()
        failure = Failure(lines[-1], first, ranks[first][1])
        shown = [f"rank {first} failed first, in phase '{ranks[first][1]}':", *lines[-SHOWN_LINES:]]
        others = {
            rank: f"in phase '{text[1]}': {text[2].strip().splitlines()[-1][:200]}" for rank, text in ranks.items()
        }
        silent = f"said nothing: perhaps ended by a signal, or still waiting, see {log.name}"
        shown += [f"rank {rank} {others.get(rank, silent)}" for rank in range(num_ranks) if rank != first]
    result = Result(layouts.name, status=Status.FAILED, failure=failure, started=now(), scenario=scenario)
    return result, "\n".join(f"     {line}" for line in shown)


def run_all(listed: list[Layouts], directory: Path, device: str, num_ranks: int, budget_s: float) -> list[Result]:
    """Run layouts until all are done or the time is up; print a line for each. Returns the results there are."""
    stop = Stop()
    with stop.on_signals():
        return _run_all(ThisProcess(stop, shows_output=True), listed, directory, device, num_ranks, budget_s)


def _run_all(
    host: Host, listed: list[Layouts], directory: Path, device: str, num_ranks: int, budget_s: float
) -> list[Result]:
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*directory.glob("*.json"), *directory.glob("*.err")]:
        path.unlink()
    content = [(each.name, flags_of(each, device, num_ranks)) for each in listed]
    (directory / LAYOUTS).write_text(json.dumps(content))
    deadline_s = time.monotonic() + budget_s
    results: list[Result] = []
    in_a_row = 0
    while len(results) < len(listed) and time.monotonic() < deadline_s and in_a_row < MOST_IN_A_ROW:
        first = len(results)
        log = directory / f"ranks_from_{first:02d}.log"
        is_complete = _start(host, directory, first, device, num_ranks, deadline_s, log)
        for each in listed[first:]:
            path = directory / f"{each.name}.json"
            if not path.exists():
                break
            results.append(read_result(path))
        in_a_row = 0 if len(results) > first else in_a_row
        if is_complete or len(results) == len(listed):
            break
        each = listed[len(results)]
        scenario = parse(flags_of(each, device, num_ranks)).scenario
        result, told = failed(directory, each, scenario, log, num_ranks)
        print(f"{row(result)}\n{told}", flush=True)
        results.append(result)
        in_a_row += 1
    return results


def _start(host: Host, directory: Path, first: int, device: str, num_ranks: int, deadline_s: float, log: Path) -> bool:
    """Start ranks that run layouts from `first` on. Whether they came to their end. Their stderr goes to `log`.

    They are of this module, not those of one scenario, so the command is not a launcher's.
    """
    command = ["env", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}", f"PYTHONPATH={python_path()}"]
    command += [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += ["--nproc-per-node", str(num_ranks), "-m", "benchmarks.shared_gpu", "--output-dir", str(directory)]
    command += ["--device", device, "--work-from", str(first), "--deadline", str(deadline_s)]
    return host.run(command, log, round(max(0.0, deadline_s - time.monotonic()) + 120)) == 0


def python_path() -> str:
    """Where ranks find this module, whatever folder they run in."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layouts", type=int, default=64)
    parser.add_argument("--num-ranks", type=int, default=8, help="most ranks of a layout, and processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, action="append", help="numbers of layouts; may be given several times")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=480, help="no layout begins after so many seconds")
    parser.add_argument("--list", action="store_true", help="list the layouts and stop")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark_results/shared_gpu"))
    parser.add_argument("--work-from", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work_from is not None:
        work(args.output_dir.absolute(), args.work_from, args.device, args.deadline)
    listed = random_layouts(args.num_layouts, args.num_ranks, args.seed)
    listed = [each for number, each in enumerate(listed) if args.only is None or number in args.only]
    scenarios = [parse(flags_of(each, args.device, args.num_ranks)).scenario for each in listed]
    print(f"{len(listed)} layouts of seed {args.seed}: {coverage(scenarios)}", flush=True)
    if args.list:
        print("\n".join(f"{each.name:<72} {one.num_ranks} ranks" for each, one in zip(listed, scenarios, strict=True)))
        return 0
    directory = args.output_dir.absolute()
    try:
        results = run_all(listed, directory, args.device, args.num_ranks, args.budget_s)
    except Cancelled:
        return CANCELLED
    name = f"{'gpu1' if args.device == 'cuda' else 'cpu'}_layouts{COLLECTION_SUFFIX}"
    if results:
        write_collection(directory / name, results)
    right = sum(map(is_right, results))
    compared = sum(each.refit.tested.num_compared for each in results if each.refit and each.refit.tested)
    print(
        f"{len(listed)} layouts: {right} right, {len(results) - right} not, {len(listed) - len(results)} not run; "
        f"{compared:,} elements compared. Results: {directory / name}"
    )
    return 1 if right < len(results) else 0 if right == len(listed) else 4


if __name__ == "__main__":
    sys.exit(main())
