"""Times planning for Kimi K2: one rank's part, and the whole dry run.

python -m benchmarks.planning
"""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from refit.cli.parsing import parse
from refit.plan.planner import plan_refit
from refit.predict.sides import predict_side

ROOT = Path(__file__).resolve().parent.parent
FLAGS = """--model kimi_k2 --refit-method nvshmem --tensor-model-parallel-size 8 --expert-model-parallel-size 8
    --rl-inference-tensor-model-parallel-size 8 --rl-inference-expert-model-parallel-size 4"""


def one_rank() -> float:
    """Seconds from flags to what rank 0 sends and receives: predict both sides, plan, select."""
    scenario = parse(shlex.split(FLAGS)).scenario
    assert scenario.model is not None
    start = time.perf_counter()
    source, destination = (predict_side(scenario.model, side) for side in scenario.sides.values())
    plan_refit(source, destination).for_rank(0)
    return time.perf_counter() - start


def main() -> int:
    print(f"one rank's part, best of 3: {min(one_rank() for _ in range(3)):.2f} s (needed 0.5)")
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "benchmark_refit.py"), "--dry-run", *shlex.split(FLAGS)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    print(f"dry run of all 96 ranks: {time.perf_counter() - start:.2f} s (needed 10), {peak_mb:.0f} MB (needed 1000)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
