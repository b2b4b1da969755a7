"""Runs layouts of the tiny model over every CPU method: with the baselines beside them, and into FP8.

    python -m benchmarks.cpu_matrix            about six minutes on two cores
    python -m benchmarks.cpu_matrix --only fp8 a part: tiny, fp8
    python -m benchmarks.cpu_matrix --list     what would run

It shows that the suite works and what its reports look like; at this size the times are those of Python and of the
scheduler. `benchmarks.transport_speed` and `benchmarks.baseline_speed` measure speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from benchmarks.listed import write_list
from benchmarks.matrix import APART, NAME_WIDTH, TOGETHER, Cell, Sizes, add_arguments, cell, chosen, run_all, selection
from refit.config.registry import METHODS

# Grouped experts, which the baseline refits correctly where ETP does not change.
MODEL = "--model tiny --moe-grouped-gemm --num-benchmark-iterations 9"
PAIRINGS = (
    (Sizes(2, 2, 2), Sizes(2, 1, 2), APART),
    (Sizes(1, 2), Sizes(1, 1), APART),
    (Sizes(2, 2), Sizes(1, 4), TOGETHER),
    (Sizes(4, 1), Sizes(2, 2), TOGETHER),
)


def cells() -> Iterator[Cell]:
    """Every pairing over every method whose default device is the CPU."""
    for method, row in METHODS.items():
        if row.device == "cpu":
            yield from (cell("tiny", *pairing, method, MODEL, "--refit-engine both") for pairing in PAIRINGS)
            yield from _quantised(method)


def _quantised(method: str) -> Iterator[Cell]:
    """Block FP8 quantised at the source where blocks lie whole there, and where it arrives; MXFP8."""
    for pairing in PAIRINGS[1:3]:
        for dtype in ("bf16", "fp8-block", "mxfp8", "fp8-block --quantise destination"):
            label = dtype.replace("--quantise", "at the")
            yield cell("fp8", *pairing, method, MODEL, f"--rl-inference-dtype {dtype}", label=label)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "benchmark_results/cpu_matrix")
    args = parser.parse_args()
    picked = chosen(cells(), args)
    if args.write_list is not None:
        write_list(selection(picked, "cpu"), args.write_list)
        return 0
    if args.list:
        for one in picked:
            print(f"{one.name:<{NAME_WIDTH}} {one.num_ranks} ranks")
        return 0
    return run_all(picked, args.output_dir, "cpu")


if __name__ == "__main__":
    sys.exit(main())
