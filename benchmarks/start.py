"""Times the start of a run, from torchrun to the first refit, by phase: a tiny model on many CPU ranks.

python -m benchmarks.start [--ranks 16 64 128]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from refit.results.result import read_result

ROOT = Path(__file__).resolve().parent.parent


def start(num_ranks: int) -> tuple[float, dict[str, float]]:
    """Run a refit from the first half of the ranks to the other. Seconds that the whole command took, and `start_s`."""
    half = str(num_ranks // 2)
    flags = [
        "--model",
        "tiny",
        "--refit-method",
        "gloo",
        "--num-benchmark-warmup",
        "0",
        "--num-benchmark-iterations",
        "1",
    ]
    flags += ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--source-world-size", half]
    flags += ["--rl-inference-tensor-model-parallel-size", "1", "--rl-inference-expert-model-parallel-size", "4"]
    flags += ["--destination-world-size", half]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        command += [str(ROOT / "benchmark_refit.py"), *flags, "--output-dir", folder, "--run-name", "start"]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        refit = read_result(Path(folder) / "start.json").refit
        assert refit is not None
        return time.perf_counter() - begin, refit.start_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    for num_ranks in parser.parse_args().ranks:
        command_s, phases = start(num_ranks)
        parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
        print(f"{num_ranks} ranks: command {command_s:.1f} s, to the first refit {sum(phases.values()):.1f} s: {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
