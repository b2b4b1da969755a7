"""Our refit against Megatron-Core's own on CPU, on the same two models in one run, both verified bit for bit.

    python -m benchmarks.peer_speed

4 -> 2 ranks, about 240 MB of weights per destination rank. Megatron's goes over Gloo, the only way it has on CPUs; ours
over Gloo and over shared memory. The ratio is printed steady (medians) and for the first refit, planning and set-up
included.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Grouped experts and an unchanged ETP: what both versions of Megatron-Core refit right.
FLAGS = """--model tiny --num-layers 4 --hidden-size 1024 --ffn-hidden-size 2048 --num-experts 16
    --moe-ffn-hidden-size 1024 --moe-shared-expert-intermediate-size 1024 --moe-layer-freq 1 --vocab-size 8192
    --moe-grouped-gemm --tensor-model-parallel-size 2 --expert-model-parallel-size 2
    --rl-inference-tensor-model-parallel-size 2 --rl-inference-expert-model-parallel-size 1
    --num-benchmark-iterations 9 --refit-engine both"""


@dataclass(frozen=True, slots=True)
class Way:
    """A way for our refit to go, and its flags."""

    name: str
    flags: str


WAYS = (
    Way("gloo", "--refit-method gloo"),
    Way("shm ring", "--refit-method shm --nvshmem-buffers ring"),
    Way("shm direct", "--refit-method shm --nvshmem-buffers direct"),
)


def measure(way: Way) -> dict[str, Any]:
    """The result of one torchrun. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "6",
            str(ROOT / "benchmark_refit.py"),
        ]
        command += [*shlex.split(FLAGS), *shlex.split(way.flags), "--output-dir", directory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(directory).glob("*.json")
        result: dict[str, Any] = json.loads(path.read_text())
    return result


def row(way: Way, result: dict[str, Any]) -> str:
    ours, peer = result["engines"]["refit"], result["engines"]["megatron"]
    if not peer["summary"]:
        return f"{way.name:<12} the peer did not run: {peer['reason']}"
    steady = [engine["summary"]["median_s"] for engine in (ours, peer)]
    first = [sum(engine["cold_s"].values()) for engine in (ours, peer)]
    wrong = [sum(sample["num_wrong"] for sample in engine["samples"]) for engine in (ours, peer)]
    return (
        f"{way.name:<12}{1e3 * steady[0]:>9.1f}{1e3 * steady[1]:>9.1f}{steady[1] / steady[0]:>7.2f}"
        f"{1e3 * first[0]:>11.1f}{1e3 * first[1]:>9.1f}{first[1] / first[0]:>7.2f}{wrong[0]:>9,}{wrong[1]:>12,}"
    )


def main() -> int:
    print(f"{'':<12}{'steady (ms)':>18}{'':>7}{'first (ms)':>20}{'':>7}{'#wrong':>21}")
    print(f"{'way':<12}{'ours':>9}{'peer':>9}{'ratio':>7}{'ours':>11}{'peer':>9}{'ratio':>7}{'ours':>9}{'peer':>12}")
    for way in WAYS:
        result = measure(way)
        print(row(way, result), flush=True)
    print(f"# Megatron-Core {result['environment']['versions']['megatron-core']}, {result['environment']['cpu']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
