"""Times planning for Kimi K2: one rank's part of 96 ranks, and dry runs of up to 4,096. In the last of these every rank
of the destination holds the whole model, and so gets a part from each group of source ranks.

python -m benchmarks.planning
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from refit.cli.parsing import parse
from refit.plan.planner import plan_refit
from refit.predict.sides import predict_side

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Size:
    """TP8 at the source, with these EP sizes on so many ranks each. `needed_s` and `needed_mb` are what to reach."""

    source_ep: int
    source: int
    destination_ep: int
    destination: int
    needed_s: float | None = None
    needed_mb: float | None = None
    destination_tp: int = 8

    @property
    def ranks(self) -> int:
        return self.source + self.destination

    @property
    def flags(self) -> list[str]:
        return shlex.split(
            f"""--model kimi_k2 --refit-method nccl --tensor-model-parallel-size 8
            --expert-model-parallel-size {self.source_ep} --source-world-size {self.source}
            --rl-inference-tensor-model-parallel-size {self.destination_tp}
            --rl-inference-expert-model-parallel-size {self.destination_ep}
            --destination-world-size {self.destination}"""
        )


SIZES = (
    Size(8, 64, 4, 32),
    Size(32, 256, 16, 256),
    Size(64, 512, 32, 512, 1.5, 300),
    Size(128, 1024, 64, 1024),
    Size(128, 2048, 64, 2048, 10, 1500),
)
DENSE = Size(128, 2048, 1, 2048, 5, 800, destination_tp=1)


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    cpu_s: float
    peak_mb: float


def one_rank(size: Size) -> float:
    """CPU seconds from sides to what rank 0 sends and receives: predict both sides, plan, select."""
    scenario = parse(size.flags).scenario
    assert scenario.model is not None
    start = time.process_time()
    source, destination = (predict_side(scenario.model, side) for side in scenario.sides.values())
    plan_refit(source, destination).for_rank(0)
    return time.process_time() - start


def dry_run(size: Size) -> Measured:
    """A whole dry run in a process of its own, its start included."""
    command = [sys.executable, str(ROOT / "benchmark_refit.py"), "--dry-run", *size.flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def exponent(fewer: Size, more: Size, less: float, greater: float) -> float:
    """`n` where the cost grows with the `n`-th power of the ranks."""
    return math.log(greater / less) / math.log(more.ranks / fewer.ranks)


def main() -> int:
    best_s = min(one_rank(SIZES[0]) for _ in range(REPEATS))
    print(f"one rank's part of {SIZES[0].ranks}, best of {REPEATS}: {best_s:.3f} s of CPU (needed 0.1)")
    sizes = (*SIZES, DENSE)
    found = {size: min((dry_run(size) for _ in range(REPEATS)), key=lambda one: one.seconds) for size in sizes}
    print(f"{'ranks':>6}{'to TP':>6}{'seconds':>9}{'CPU s':>8}{'needed':>8}{'peak MB':>9}{'needed':>8}")
    for size, one in found.items():
        needed_s, needed_mb = (f"{needed:g}" if needed else "-" for needed in (size.needed_s, size.needed_mb))
        ranks, spent = f"{size.ranks:>6}{size.destination_tp:>6}", f"{one.seconds:>9.2f}{one.cpu_s:>8.2f}{needed_s:>8}"
        print(f"{ranks}{spent}{one.peak_mb:>9.0f}{needed_mb:>8}")
    first, last = SIZES[0], SIZES[-1]
    growth = exponent(first, last, found[first].cpu_s, found[last].cpu_s)
    late = exponent(SIZES[-3], last, found[SIZES[-3]].cpu_s, found[last].cpu_s)
    memory = exponent(SIZES[-3], last, found[SIZES[-3]].peak_mb, found[last].peak_mb)
    print(
        f"CPU time grows as ranks^{growth:.2f} from {first.ranks} to {last.ranks}, process start included; from "
        f"{SIZES[-3].ranks} on as ranks^{late:.2f}, memory as ranks^{memory:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
