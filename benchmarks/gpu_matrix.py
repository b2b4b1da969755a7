"""Runs the speed rows and the reference's 8-GPU configurations on the GPUs of this machine, one scenario each.

    python -m benchmarks.gpu_matrix                    all cells, a few minutes on 8 H200
    python -m benchmarks.gpu_matrix --only speed       a part: speed, large, drift, correctness, te, reference, fp8,
                                                       fp8-large
    python -m benchmarks.gpu_matrix --num-gpus 4       what fits four GPUs or two, with speed rows of their own
    python -m benchmarks.gpu_matrix --num-gpus 1       speed and fp8: one rank, and two that share the GPU
    python -m benchmarks.gpu_matrix --list             what would run, and the lower bound of each cell's plan on H200

`--output-dir` gets a table of all cells, one `gpu<N>_<PART>.jsonl` per part, and in `logs` a JSON and a log per cell.
`--write-list FILE` writes the list, which `refit sweep run --scenarios FILE` takes. Copied to docs/results the parts
make the tables of docs/performance.md (`python -m docs.tables`). The exit code is 0 if every cell that could run was
right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.listed import write_list
from benchmarks.matrix import APART, NAME_WIDTH, TOGETHER, Cell, Sizes, add_arguments, cell, chosen, run_all, selection
from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.predict.dry_run import DryRunOptions, dry_run

METHODS = ("cuda-ipc", "nccl", "nvshmem")
DTYPES = ("bf16", "fp8-block --quantise source", "mxfp8 --quantise source")
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


Pairing = tuple[Sizes, Sizes, str]


@dataclass(frozen=True, slots=True)
class Rows:
    """Source, destination and mode of the cells that depend on how many GPUs there are; `speed[0]` has equal sides.

    `large_experts` are as many as fit a GPU of 139 GiB in that row.
    """

    speed: tuple[Pairing, ...]
    correctness: tuple[Pairing, ...]
    large_experts: int = 384


WHOLE = Rows(
    speed=(
        (Sizes(2, 2), Sizes(2, 2), APART),
        (Sizes(4, 1, 4), Sizes(2, 2), APART),
        (Sizes(4, 1), Sizes(2, 1), APART),
        (Sizes(4, 2), Sizes(2, 4), TOGETHER),
        (Sizes(8, 1), Sizes(4, 2), TOGETHER),
    ),
    correctness=((Sizes(4, 1, 2), Sizes(4, 1, 4), APART), (Sizes(2, 2), Sizes(1, 4), APART)),
)
HALVED = Rows(
    speed=(
        (Sizes(1, 2), Sizes(1, 2), APART),
        (Sizes(2, 1, 2), Sizes(1, 2), APART),
        (Sizes(2, 1), Sizes(1, 1), APART),
        (Sizes(2, 2), Sizes(1, 4), TOGETHER),
        (Sizes(4, 1), Sizes(2, 2), TOGETHER),
    ),
    correctness=((Sizes(4, 1, 2), Sizes(4, 1, 4), TOGETHER), (Sizes(2, 2), Sizes(1, 4), TOGETHER)),
)
PAIR = Rows(
    speed=(
        (Sizes(1, 1), Sizes(1, 1), APART),
        (Sizes(2, 1, 2), Sizes(1, 2), TOGETHER),
        (Sizes(2, 1), Sizes(1, 2), TOGETHER),
    ),
    correctness=((Sizes(2, 1, 2), Sizes(1, 2), TOGETHER), (Sizes(1, 2), Sizes(2, 1, 2), TOGETHER)),
    large_experts=192,
)


def cells(num_gpus: int) -> Iterator[Cell]:
    """The cells that fit `num_gpus`. The speed rows of fewer than 8 GPUs have smaller sizes."""
    if num_gpus == 1:
        yield from _alone()
        return
    rows = WHOLE if num_gpus >= 8 else HALVED if num_gpus >= 4 else PAIR
    for method in METHODS:
        for part_cells in (
            _speed(rows, method),
            _correctness(rows, method),
            _transformer_engine(method),
            _reference(method),
            _quantised(rows, method),
        ):
            yield from (one for one in part_cells if one.num_ranks <= num_gpus)


def _alone() -> Iterator[Cell]:
    """One GPU: one rank that has both sides, then two ranks of a side each, over what each can run."""
    model, one, other = (SPEED_MODEL, "--moe-grouped-gemm"), Sizes(1, 1), "fp8-block --quantise destination"
    for mode, methods, shared in ((TOGETHER, ("cuda-ipc", "nccl"), ""), (APART, ("cuda-ipc",), "--ranks-per-gpu 2")):
        for method in methods:
            yield cell("speed", one, one, mode, method, *model, "--refit-engine refit,megatron", shared)
        for dtype in (*DTYPES, other):
            label = _label(dtype)
            yield cell("fp8", one, one, mode, "cuda-ipc", *model, f"--rl-inference-dtype {dtype}", shared, label=label)


def _speed(rows: Rows, method: str) -> Iterator[Cell]:
    # The baseline refits grouped experts, which are one module, correctly, and sequential experts wrongly.
    model = (SPEED_MODEL, "--moe-grouped-gemm")
    for source, destination, mode in rows.speed:
        yield cell("speed", source, destination, mode, method, *model, "--refit-engine refit,megatron,nccl-m2n")
    equal = rows.speed[0]
    for label, way in NVSHMEM_WAYS if method == "nvshmem" else ():
        yield cell("speed", *equal, method, *model, way, label=label)
    large = rows.large_experts
    yield cell("large", *equal, method, *model, f"--num-experts {large}", label=f"{large} experts")
    yield cell("drift", *equal, method, *model, "--num-benchmark-iterations 50", label="50 iterations")


def _correctness(rows: Rows, method: str) -> Iterator[Cell]:
    for source, destination, mode in rows.correctness:
        yield cell("correctness", source, destination, mode, method, CORRECTNESS_MODEL, "--refit-engine both")


def _transformer_engine(method: str) -> Iterator[Cell]:
    for source, destination, mode in (
        (Sizes(1, 2), Sizes(1, 1), APART),
        (Sizes(1, 1), Sizes(1, 2), APART),
        (Sizes(2, 1, 2), Sizes(1, 2, 1), APART),
        (Sizes(2, 1, 2), Sizes(1, 2, 1), TOGETHER),
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


def _quantised(rows: Rows, method: str) -> Iterator[Cell]:
    """The speed rows in BF16 and quantised at the source, where all blocks lie whole, and one where it arrives.

    In BF16 stay a quarter of the speed rows' weights, vocabulary above all, and 6 % of the large ones.
    """
    model = (SPEED_MODEL, "--moe-grouped-gemm")
    cases = [(pairing, dtype) for pairing in rows.speed for dtype in DTYPES]
    for pairing, dtype in [*cases, (rows.speed[0], "fp8-block --quantise destination")]:
        yield cell("fp8", *pairing, method, *model, f"--rl-inference-dtype {dtype}", label=_label(dtype))
    for dtype in DTYPES:
        flags = f"--num-experts {rows.large_experts} --rl-inference-dtype {dtype}"
        label = f"{rows.large_experts} experts {_label(dtype)}"
        yield cell("fp8-large", *rows.speed[0], method, *model, flags, label=label)


def _label(dtype: str) -> str:
    return dtype.replace("--quantise", "at the")


def predicted(one: Cell) -> str:
    """The lower bound of a cell's plan, with link speeds as measured on 8 H200, and what limits it."""
    bound = dry_run(parse([*one.flags, "--dry-run"]).scenario, DryRunOptions(cluster=load_cluster("h200_nvlink"))).bound
    return "-" if bound is None else f"{1e3 * bound.seconds:8.2f} ms: {bound.limited_by}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "benchmark_results/gpu_matrix")
    parser.add_argument("--num-gpus", type=int, default=8)
    args = parser.parse_args()
    picked = chosen(cells(args.num_gpus), args)
    if args.write_list is not None:
        write_list(selection(picked, f"gpu{args.num_gpus}"), args.write_list)
        return 0
    if args.list:
        for one in picked:
            print(f"{one.name:<{NAME_WIDTH}} {predicted(one)}")
        return 0
    return run_all(picked, args.output_dir, f"gpu{args.num_gpus}", args.num_gpus)


if __name__ == "__main__":
    sys.exit(main())
