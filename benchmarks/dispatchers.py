"""Token dispatchers and the whole cycle on the GPUs of one host, with Kimi K2's widths: one command, resumable.

    python -m benchmarks.dispatchers --num-gpus 4 --output-dir dispatcher_results

Every run is a process group of its own and writes one small result file; one that is there and ok is not run again.
`--cpu` runs the same list with the tiny model on CPU ranks, as a rehearsal. At the end the report is printed and
`index.csv`, the loss curves and, with matplotlib, the pictures are written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refit.errors import UsageError
from refit.results.result import read_result
from refit.results.status import Status

WIDTHS = ["--model=kimi_k2", "--num-layers=4", "--moe-layer-freq=([0]*1+[1]*3)", "--num-experts=64"]
WIDTHS += ["--moe-grouped-gemm", "--moe-router-dtype=fp32", "--moe-router-force-load-balancing", "--seq-length=4096"]
TINY = ["--model=tiny", "--moe-router-dtype=fp32", "--moe-router-force-load-balancing", "--seq-length=32"]
ARMS = ("alltoall", "allgather")


@dataclass(frozen=True, slots=True)
class Case:
    """One run: its name, which is that of its result file, and its flags."""

    name: str
    flags: tuple[str, ...]


def cases(num_gpus: int, micro_batches: list[int], tp: int, impl: str, cpu: bool) -> Iterator[Case]:
    """Training steps of every arm, with experts over all GPUs, then with TP as well; last the cycle."""
    common = [*(TINY if cpu else WIDTHS), f"--transformer-impl={impl}", f"--refit-method={'gloo' if cpu else 'nccl'}"]
    batch = [f"--global-batch-size={max(micro_batches) * num_gpus}"]
    layouts = {f"EP{num_gpus}": [f"--expert-model-parallel-size={num_gpus}"]}
    if tp > 1:
        layouts[f"TP{tp}_EP{num_gpus // tp}"] = [
            f"--tensor-model-parallel-size={tp}",
            f"--expert-model-parallel-size={num_gpus // tp}",
            "--sequence-parallel",
            *(["--expert-tensor-parallel-size=1"] if num_gpus > tp else []),
        ]
    for layout, sizes in layouts.items():
        for micro in micro_batches:
            for arm in ARMS:
                flags = (*common, *sizes, *batch, f"--micro-batch-size={micro}", f"--moe-token-dispatcher-type={arm}")
                yield Case(f"{layout}_mb{micro}_{arm}", (*flags, "--measure=train-step"))
    refit = ["--measure=train-step,refit,forward", "--refit-mode=collocated", "--check-forward"]
    refit += [f"--rl-inference-tensor-model-parallel-size={num_gpus}", "--rl-inference-expert-model-parallel-size=1"]
    sizes = layouts[f"EP{num_gpus}"]
    yield Case(
        "cycle", (*common, *sizes, *batch, "--micro-batch-size=1", "--moe-token-dispatcher-type=alltoall", *refit)
    )


def run(case: Case, output_dir: Path, steps: list[str]) -> None:
    """Run a case unless its result is there and ok. What it prints goes to `<name>.log`."""
    path = output_dir / f"{case.name}.json"
    if _is_ok(path):
        print(f"{case.name}: there already")
        return
    if path.exists():  # a run that failed is kept under another name
        path.replace(output_dir / f"{case.name}.{sum(1 for _ in output_dir.glob(f'{case.name}*'))}.failed")
    words = [*case.flags, *steps, f"--output-dir={output_dir}", f"--run-name={case.name}"]
    with (output_dir / f"{case.name}.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(
            [sys.executable, "-m", "refit", "run", *words], stdout=log, stderr=subprocess.STDOUT
        ).returncode
    print(f"{case.name}: exit code {code}", flush=True)


def _is_ok(path: Path) -> bool:
    try:
        return path.exists() and read_result(path).status is Status.OK
    except UsageError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=4, help="GPUs of this host; default: 4")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--tp", type=int, default=2, help="TP of the second layout, 1 for none; default: 2")
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--num-steps", type=int, default=20, help="timed steps; default: 20")
    parser.add_argument("--num-warmup", type=int, default=4, help="default: 4")
    parser.add_argument("--cpu", action="store_true", help="the tiny model on CPU ranks")
    parser.add_argument("--output-dir", type=Path, default=Path("dispatcher_results"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    steps = [f"--num-train-steps={args.num_steps}", f"--num-train-warmup={args.num_warmup}"]
    for case in cases(args.num_gpus, args.micro_batches, args.tp, args.transformer_impl, args.cpu):
        run(case, args.output_dir, steps)
    folder = str(args.output_dir)
    subprocess.run([sys.executable, "-m", "refit", "report", folder, "--tables", folder])
    return subprocess.run([sys.executable, "-m", "refit", "plot", folder]).returncode


if __name__ == "__main__":
    sys.exit(main())
