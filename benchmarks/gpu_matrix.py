"""Runs the speed rows and the reference's 8-GPU configurations on the GPUs of this machine, one scenario each.

    python -m benchmarks.gpu_matrix                    all cells, a few minutes on 8 H200
    python -m benchmarks.gpu_matrix --only speed       a part: speed, large, drift, correctness, te, reference
    python -m benchmarks.gpu_matrix --num-gpus 4       what fits four GPUs, the speed rows halved
    python -m benchmarks.gpu_matrix --list             what would run, and the lower bound of each cell's plan on H200

Every cell is one torchrun with its own timeout, so a cell that fails or hangs does not stop the others. `--output-dir`
gets one JSON and one log per cell, and a table of all cells. The exit code is 0 if every cell that could run was right.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.results.refit import EngineResult
from refit.results.result import Result, read_result
from refit.results.status import Status

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("nccl", "nvshmem")
NVSHMEM_WAYS = (("direct", "--one-sided-buffers direct"), ("put", "--nvshmem-force-put"))

# The model of the speed rows: Kimi K2's widths, fewer experts and layers, so that both sides fit one host.
SPEED_MODEL = """--num-layers 4 --hidden-size 7168 --num-attention-heads 64 --ffn-hidden-size 18432 --vocab-size 163840
    --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --bf16 --num-benchmark-warmup 2 --num-benchmark-iterations 7"""
CORRECTNESS_MODEL = """--num-layers 4 --hidden-size 2048 --num-attention-heads 16 --num-query-groups 8 --num-experts 32
    --moe-router-topk 4 --moe-ffn-hidden-size 1024 --moe-grouped-gemm --moe-router-enable-expert-bias --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --bf16 --num-benchmark-warmup 1 --num-benchmark-iterations 3"""
LATENT_MODEL = """--num-layers 3 --hidden-size 2048 --num-attention-heads 16 --multi-latent-attention --q-lora-rank 512
    --kv-lora-rank 256 --qk-layernorm --ffn-hidden-size 4096 --moe-layer-freq ([0]*1+[1]*2) --num-experts 16
    --moe-router-topk 4 --moe-ffn-hidden-size 1024 --moe-shared-expert-intermediate-size 1024 --moe-grouped-gemm
    --moe-router-enable-expert-bias --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --position-embedding-type rope --bf16
    --transformer-impl transformer_engine --num-benchmark-warmup 1 --num-benchmark-iterations 3"""
REFERENCE_MODEL = """--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --seq-length 512
    --max-position-embeddings 512 --micro-batch-size 1 --num-experts 16 --moe-router-topk 2
    --moe-shared-expert-intermediate-size 512 --ffn-hidden-size 2688 --disable-bias-linear --num-benchmark-iterations
    3"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One scenario of the matrix: its part, its name, and its flags of `benchmark_refit.py`."""

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


APART, TOGETHER = "non-collocated", "collocated"
Pairing = tuple[Sizes, Sizes, str]


@dataclass(frozen=True, slots=True)
class Rows:
    """Source, destination and mode of the cells that depend on how many GPUs there are; `speed[0]` has equal sides."""

    speed: tuple[Pairing, ...]
    correctness: tuple[Pairing, ...]


WHOLE = Rows(
    speed=(
        (Sizes(2, 2), Sizes(2, 2), APART),
        (Sizes(4, 1), Sizes(2, 1), APART),
        (Sizes(4, 2), Sizes(2, 4), TOGETHER),
        (Sizes(8, 1), Sizes(4, 2), TOGETHER),
    ),
    correctness=((Sizes(4, 1, 2), Sizes(4, 1, 4), APART), (Sizes(2, 2), Sizes(1, 4), APART)),
)
HALVED = Rows(
    speed=(
        (Sizes(1, 2), Sizes(1, 2), APART),
        (Sizes(2, 1), Sizes(1, 1), APART),
        (Sizes(2, 2), Sizes(1, 4), TOGETHER),
        (Sizes(4, 1), Sizes(2, 2), TOGETHER),
    ),
    correctness=((Sizes(4, 1, 2), Sizes(4, 1, 4), TOGETHER), (Sizes(2, 2), Sizes(1, 4), TOGETHER)),
)


def cell(part: str, source: Sizes, destination: Sizes, mode: str, method: str, *extra: str, label: str = "") -> Cell:
    name = f"{part} TP{source.tp} EP{source.ep} -> TP{destination.tp} EP{destination.ep}"
    if (source.etp, destination.etp) != (1, 1):
        name += f" ETP{source.etp} -> {destination.etp}"
    flags = [
        source.flags(""),
        destination.flags("rl-inference-"),
        f"--refit-mode {mode} --refit-method {method}",
        *extra,
    ]
    sizes = (source.tp * source.ep, destination.tp * destination.ep)
    num_gpus = max(sizes) if mode == "collocated" else sum(sizes)
    return Cell(part, f"{name} {mode} {method} {label}".strip(), tuple(shlex.split(" ".join(flags))), num_gpus)


def cells(num_gpus: int) -> Iterator[Cell]:
    """The cells that fit `num_gpus`. With fewer than 8 GPUs the speed rows' sizes are halved."""
    rows = WHOLE if num_gpus >= 8 else HALVED
    for method in METHODS:
        for part_cells in (
            _speed(rows, method),
            _correctness(rows, method),
            _transformer_engine(method),
            _reference(method),
        ):
            yield from (one for one in part_cells if one.num_gpus <= num_gpus)


def _speed(rows: Rows, method: str) -> Iterator[Cell]:
    # The baseline refits grouped experts, which are one module, correctly, and sequential experts wrongly.
    model = (SPEED_MODEL, "--moe-grouped-gemm")
    for source, destination, mode in rows.speed:
        yield cell("speed", source, destination, mode, method, *model, "--refit-engine both")
    equal = rows.speed[0]
    for label, way in NVSHMEM_WAYS if method == "nvshmem" else ():
        yield cell("speed", *equal, method, *model, way, label=label)
    yield cell("large", *equal, method, *model, "--num-experts 384", label="384 experts")
    yield cell("drift", *equal, method, *model, "--num-benchmark-iterations 50", label="50 iterations")


def _correctness(rows: Rows, method: str) -> Iterator[Cell]:
    for source, destination, mode in rows.correctness:
        yield cell("correctness", source, destination, mode, method, CORRECTNESS_MODEL, "--refit-engine both")


def _transformer_engine(method: str) -> Iterator[Cell]:
    for source, destination, mode in (
        (Sizes(1, 2), Sizes(1, 1), APART),
        (Sizes(1, 1), Sizes(1, 2), APART),
        (Sizes(2, 1, 2), Sizes(1, 2, 1), APART),
        (Sizes(2, 2, 2), Sizes(4, 1, 4), TOGETHER),
        (Sizes(4, 1, 1), Sizes(2, 2, 2), TOGETHER),
    ):
        yield cell("te", source, destination, mode, method, LATENT_MODEL, "--refit-engine both --check-forward")


def _reference(method: str) -> Iterator[Cell]:
    for source, destination, mode in (
        (Sizes(2, 2), Sizes(2, 1), APART),
        (Sizes(2, 2), Sizes(2, 2), APART),
        (Sizes(4, 1), Sizes(2, 1), APART),
        (Sizes(2, 1), Sizes(1, 1), APART),
        (Sizes(4, 1), Sizes(4, 1), APART),
        (Sizes(1, 4), Sizes(1, 2), APART),
        (Sizes(4, 2), Sizes(2, 4), TOGETHER),
        (Sizes(8, 1), Sizes(4, 2), TOGETHER),
        (Sizes(4, 2), Sizes(4, 1), TOGETHER),
        (Sizes(2, 2), Sizes(2, 1), TOGETHER),
    ):
        yield cell("reference", source, destination, mode, method, REFERENCE_MODEL)


def predicted(one: Cell) -> str:
    """The lower bound of a cell's plan, with link speeds as measured on 8 H200, and what limits it."""
    bound = dry_run(parse([*one.flags, "--dry-run"]).scenario, DryRunOptions(cluster=load_cluster("h200_nvlink"))).bound
    return "-" if bound is None else f"{1e3 * bound.seconds:8.2f} ms: {bound.limited_by}"


def run(one: Cell, directory: Path, num_gpus: int) -> Result | None:
    """Run a cell and return its result, or None where it wrote none. Its log is `<directory>/log`."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_gpus)]
    command += [str(ROOT / "benchmark_refit.py"), *one.flags, "--output-dir", str(directory)]
    command += ["--timeout", str(one.timeout_s // 2)]
    with (directory / "log").open("w") as log:
        # Its own process group, so that a timeout ends the ranks as well.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(one.timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = sorted(directory.glob("*.json"))
    if not results or not results[-1].stat().st_size:
        return None
    return read_result(results[-1])


def row(one: Cell, result: Result | None) -> str:
    """One line of the table: ms (medians), the plan's lower bound, GB/s of the busiest rank, the baseline's, wrong
    elements.

    `first` is planning, preparing and the first refit; `extra` the most device memory beyond both models.
    """
    measured = result.refit if result else None
    if result is None or measured is None or not measured.engines:
        return f"{one.name:<{NAME_WIDTH}} {'failed':>8}  no result, see its log"
    ours, theirs = (measured.engines.get(name, EngineResult()) for name in ("refit", "megatron"))
    extra = [nbytes for nbytes in ours.extra_memory_bytes_per_rank if nbytes is not None]
    cells = [
        _text(ours.median_s, 1e3),
        _text(measured.bound.seconds if measured.bound else None, 1e3),
        _text(ours.bottleneck_gb_per_s, 1),
        _text(ours.first_s if ours.cold_s else None, 1e3),
        _text(ours.connect_s, 1e3),
        _text(max(extra, default=None), 2**-20),
        _wrong(ours),
        _text(theirs.median_s, 1e3),
        _text(theirs.bottleneck_gb_per_s, 1),
        _wrong(theirs) if "megatron" in measured.engines else "-",
        f"{theirs.median_s / ours.median_s:.2f}" if theirs.median_s and ours.median_s else "-",
    ]
    padded = " ".join(f"{text:>{width}}" for text, width in zip(cells, WIDTHS, strict=True))
    return f"{one.name:<{NAME_WIDTH}} {padded}  {result.status.value}"


def _text(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.1f}"


def _wrong(engine: EngineResult) -> str:
    return f"{engine.num_wrong:,}" if engine.samples else engine.status.value


NAME_WIDTH = 72
TITLES = ("ms", "bound ms", "GB/s", "first ms", "connect", "extra MiB", "#wrong", "base ms", "GB/s", "#wrong", "ratio")
WIDTHS = (8, 8, 7, 8, 8, 9, 7, 9, 7, 14, 6)
HEADER = (
    f"{'cell':<{NAME_WIDTH}} "
    + " ".join(f"{title:>{width}}" for title, width in zip(TITLES, WIDTHS, strict=True))
    + "  status"
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
    chosen = [
        one for one in cells(args.num_gpus) if args.match in one.name and (args.only is None or one.part in args.only)
    ]
    if args.list:
        for one in chosen:
            print(f"{one.name:<{NAME_WIDTH}} {predicted(one)}")
        return 0
    lines, failed = [HEADER], 0
    for number, one in enumerate(chosen):
        wider = dataclasses.replace(one, flags=(*one.flags, *args.flags))
        result = run(
            wider,
            args.output_dir / f"{number:02d}_{'_'.join(one.name.replace('->', 'to').lower().split())}",
            args.num_gpus,
        )
        failed += result is None or result.status not in (Status.OK, Status.WAIVED)
        lines.append(row(one, result))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    (args.output_dir / "table.txt").write_text(table + "\n")
    print(f"\n{table}\n\n{len(chosen) - failed} of {len(chosen)} cells right or waived")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
