"""The speed rows and the reference's 8-GPU configurations, each a scenario of its own, on the GPUs of this machine.

    python -m benchmarks.gpu_matrix                    all cells, a few minutes on 8 H200
    python -m benchmarks.gpu_matrix --only speed       a part: speed, large, drift, correctness, reference, half
    python -m benchmarks.gpu_matrix --num-gpus 4       what fits four GPUs: the speed rows halved, some of the rest
    python -m benchmarks.gpu_matrix --list             what would run

Every cell is one torchrun with its own timeout, so one that fails or hangs does not stop the others. Results lie under
`--output-dir`, one JSON per cell with its log beside it, and a table at the end. The exit code is 0 if every cell that
could run was right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("nccl", "nvshmem")
NVSHMEM_WAYS = (("direct", "--nvshmem-buffers direct"), ("put", "--nvshmem-force-put"))

# The model of the speed rows: Kimi K2's widths, fewer experts and layers, so that both sides fit one host.
SPEED_MODEL = """--num-layers 4 --hidden-size 7168 --num-attention-heads 64 --ffn-hidden-size 18432 --vocab-size 163840
    --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --bf16 --num-benchmark-warmup 2 --num-benchmark-iterations 7"""
CORRECTNESS_MODEL = """--num-layers 4 --hidden-size 2048 --num-attention-heads 16 --num-query-groups 8 --num-experts 32
    --moe-router-topk 4 --moe-ffn-hidden-size 1024 --moe-grouped-gemm --moe-router-enable-expert-bias --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --bf16 --num-benchmark-warmup 1 --num-benchmark-iterations 3"""
REFERENCE_MODEL = """--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --seq-length 512
    --max-position-embeddings 512 --micro-batch-size 1 --num-experts 16 --moe-router-topk 2
    --moe-shared-expert-intermediate-size 512 --ffn-hidden-size 2688 --disable-bias-linear --num-benchmark-iterations 3"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One scenario of the matrix: a part it belongs to, a name, and the flags of `benchmark_refit.py`."""

    part: str
    name: str
    flags: tuple[str, ...]
    num_gpus: int
    timeout_s: int = 120


@dataclass(frozen=True, slots=True)
class Sizes:
    """TP, EP and ETP of one side."""

    tp: int
    ep: int
    etp: int = 1

    def flags(self, prefix: str) -> str:
        etp = "expert-tensor-model-parallel-size" if prefix else "expert-tensor-parallel-size"
        return (
            f"--{prefix}tensor-model-parallel-size {self.tp} --{prefix}expert-model-parallel-size {self.ep} "
            f"--{prefix}{etp} {self.etp}"
        )


def cell(part: str, source: Sizes, destination: Sizes, mode: str, method: str, *extra: str, label: str = "") -> Cell:
    name = f"{part} TP{source.tp} EP{source.ep} -> TP{destination.tp} EP{destination.ep}"
    if (source.etp, destination.etp) != (1, 1):
        name += f" ETP{source.etp} -> {destination.etp}"
    flags = [source.flags(""), destination.flags("rl-inference-"), f"--refit-mode {mode} --refit-method {method}", *extra]
    sizes = (source.tp * source.ep, destination.tp * destination.ep)
    num_gpus = max(sizes) if mode == "collocated" else sum(sizes)
    return Cell(part, f"{name} {mode} {method} {label}".strip(), tuple(shlex.split(" ".join(flags))), num_gpus)


def cells() -> Iterator[Cell]:
    apart, together = "non-collocated", "collocated"
    for method in METHODS:
        both = (SPEED_MODEL, "--refit-engine both")
        grouped = (*both, "--moe-grouped-gemm")  # experts as one module, which the peer refits right
        yield cell("speed", Sizes(2, 2), Sizes(2, 2), apart, method, *both)
        yield cell("speed", Sizes(4, 1), Sizes(2, 1), apart, method, *both)
        yield cell("speed", Sizes(4, 2), Sizes(2, 4), together, method, *both)
        yield cell("speed", Sizes(8, 1), Sizes(4, 2), together, method, *both)
        for label, way in NVSHMEM_WAYS if method == "nvshmem" else ():
            yield cell("speed", Sizes(2, 2), Sizes(2, 2), apart, method, SPEED_MODEL, way, label=label)
            yield cell("half", Sizes(1, 2), Sizes(1, 2), apart, method, SPEED_MODEL, way, label=label)
        yield cell("half", Sizes(1, 2), Sizes(1, 2), apart, method, *grouped)
        yield cell("half", Sizes(2, 1), Sizes(1, 1), apart, method, *grouped)
        yield cell("half", Sizes(2, 2), Sizes(1, 4), together, method, *grouped)
        yield cell("half", Sizes(4, 1), Sizes(2, 2), together, method, *grouped)
        yield cell("large", Sizes(2, 2), Sizes(2, 2), apart, method, SPEED_MODEL, "--num-experts 384", label="384 experts")
        yield cell("drift", Sizes(2, 2), Sizes(2, 2), apart, method, SPEED_MODEL, "--num-benchmark-iterations 50")
        yield cell("correctness", Sizes(4, 1, 2), Sizes(4, 1, 4), apart, method, CORRECTNESS_MODEL, "--refit-engine both")
        yield cell("correctness", Sizes(2, 2), Sizes(1, 4), apart, method, CORRECTNESS_MODEL, "--refit-engine both")
        for source, destination in (
            (Sizes(2, 2), Sizes(2, 1)),
            (Sizes(2, 2), Sizes(2, 2)),
            (Sizes(4, 1), Sizes(2, 1)),
            (Sizes(2, 1), Sizes(1, 1)),
            (Sizes(4, 1), Sizes(4, 1)),
            (Sizes(1, 4), Sizes(1, 2)),
        ):
            yield cell("reference", source, destination, apart, method, REFERENCE_MODEL)
        for source, destination in (
            (Sizes(4, 2), Sizes(2, 4)),
            (Sizes(8, 1), Sizes(4, 2)),
            (Sizes(4, 2), Sizes(4, 1)),
            (Sizes(2, 2), Sizes(2, 1)),
        ):
            yield cell("reference", source, destination, together, method, REFERENCE_MODEL)


def run(one: Cell, directory: Path, num_gpus: int) -> dict[str, Any] | None:
    """Run a cell and return its result, or None where it left none. Its log is `<directory>/<name>.log`."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_gpus)]
    command += [str(ROOT / "benchmark_refit.py"), *one.flags, "--output-dir", str(directory)]
    command += ["--timeout", str(one.timeout_s // 2)]
    with (directory / "log").open("w") as log:
        # A process group of its own, so that a cell past its time takes its ranks along.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(one.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = sorted(directory.glob("*.json"))
    if not results or not results[-1].stat().st_size:
        return None
    content: dict[str, Any] = json.loads(results[-1].read_text())
    return content


def row(one: Cell, result: dict[str, Any] | None) -> str:
    """One line of the table: medians in ms, GB/s of the busiest rank, the peer's, the ratio, wrong elements, status."""
    if result is None or not result.get("engines"):
        return f"{one.name:<68} {'failed':>8}  no result, see its log"
    ours, peer = (result["engines"].get(name, {}) for name in ("refit", "megatron"))
    numbers = [_number(ours, "median_s", 1e3), _number(ours, None), _number(peer, "median_s", 1e3), _number(peer, None)]
    medians = [engine.get("summary", {}).get("median_s") for engine in (ours, peer)]
    ratio = f"{medians[1] / medians[0]:.2f}" if all(medians) else "-"
    first = sum(seconds for seconds in ours.get("cold_s", {}).values()) if ours.get("summary") else 0.0
    wrong = [_wrong(engine) for engine in (ours, peer)]
    return (
        f"{one.name:<68} {numbers[0]:>8} {numbers[1]:>7} {1e3 * first:>8.0f} {wrong[0]:>7} "
        f"{numbers[2]:>9} {numbers[3]:>7} {wrong[1]:>11} {ratio:>6}  {result['status']}"
    )


def _number(engine: dict[str, Any], name: str | None, scale: float = 1.0) -> str:
    value = engine.get("bottleneck_gb_per_s") if name is None else engine.get("summary", {}).get(name)
    return "-" if value is None else f"{value * scale:.1f}"


def _wrong(engine: dict[str, Any]) -> str:
    if not engine.get("samples"):
        return str(engine.get("status", "-"))
    return f"{sum(sample['num_wrong'] for sample in engine['samples']):,}"


HEADER = (
    f"{'cell':<68} {'ms':>8} {'GB/s':>7} {'first ms':>8} {'#wrong':>7} "
    f"{'peer ms':>9} {'GB/s':>7} {'#wrong':>11} {'ratio':>6}  status"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="parts to run; may be given several times")
    parser.add_argument("--match", default="", help="run only cells whose name contains this")
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument("--num-gpus", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark_results/gpu_matrix"))
    parser.add_argument("flags", nargs="*", help="flags for every cell, after --")
    args = parser.parse_args()
    parts = args.only or {one.part for one in cells()} - ({"half"} if args.num_gpus >= 8 else {"speed"})
    fitting = [one for one in cells() if one.num_gpus <= args.num_gpus]
    chosen = [one for one in fitting if one.part in parts and args.match in one.name]
    if args.list:
        print("\n".join(one.name for one in chosen))
        return 0
    lines, failed = [HEADER], 0
    for number, one in enumerate(chosen):
        wider = dataclasses.replace(one, flags=(*one.flags, *args.flags))
        result = run(
            wider, args.output_dir / f"{number:02d}_{'_'.join(one.name.replace('->', 'to').lower().split())}", args.num_gpus
        )
        failed += result is None or result["status"] not in ("ok", "waived")
        lines.append(row(one, result))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    (args.output_dir / "table.txt").write_text(table + "\n")
    print(f"\n{table}\n\n{len(chosen) - failed} of {len(chosen)} cells right or waived")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
