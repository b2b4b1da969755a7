"""The speed of the quantising kernel on a GPU: `python -m benchmarks.quantise_speed`.

Every rule quantises the same experts, and the yardstick is one `copy_` of the same weights in the same run. Bytes count
as read and as written: 2 + 1 per element and the scales; for the copy 2 + 2. A sample of every result is compared with
plain torch, as bits. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

from refit.config.quantisation import BLOCK_FORMATS, CODES_DTYPE, Quantisation
from refit.encodings.fp8.kernel import KernelQuantise
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.reference import quantise

ROWS, COLUMNS = 4096, 7168
"""An expert's gate and up projections in Kimi K2."""


def median_s(run: Callable[[], object], num_rounds: int) -> float:
    """The median time of `run` on the current stream, in seconds, after two runs to warm up."""
    seconds = []
    for number in range(2 + num_rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run()
        ended.record()
        ended.synchronize()
        if number >= 2:
            seconds.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(seconds)


def outputs(weights: torch.Tensor, quantisation: Quantisation) -> list[Matrix]:
    """Every `[ROWS, COLUMNS]` of `weights` with codes and scales in new memory."""
    block = quantisation.format
    codes = torch.empty_like(weights, dtype=getattr(torch, CODES_DTYPE))
    shape = (len(weights), -(-ROWS // block.rows), COLUMNS // block.columns)
    scales = torch.empty(shape, dtype=getattr(torch, block.scale_dtype), device=weights.device)
    return [Matrix("experts", *each) for each in zip(weights, codes, scales, strict=True)]


def is_right(matrix: Matrix, quantisation: Quantisation) -> bool:
    """Whether codes and scales are those of plain torch, to the bit."""
    expected = quantise(matrix.weights, quantisation)
    pairs = ((matrix.codes, expected.codes), (matrix.scales, expected.scales))
    return all(torch.equal(found.view(torch.uint8), right.view(torch.uint8)) for found, right in pairs)


def main() -> int:
    """Print a row per rule. Returns 1 where codes or scales are wrong, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64, help="matrices of 4,096 x 7,168 (default: 64, 3.8 GB)")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each (default: 7)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("quantise_speed: this machine has no CUDA GPU that PyTorch can use", file=sys.stderr)
        return 3
    weights = torch.randn(args.experts, ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16) * 0.02
    print(f"{torch.cuda.get_device_name()}, {weights.numel() / 1e9:.2f} B elements, median of {args.rounds}")
    print(f"{'':26} {'ms':>8} {'TB/s':>6}")
    seconds = median_s(partial(torch.empty_like(weights).copy_, weights), args.rounds)
    print(f"{'copy_':26} {seconds * 1e3:8.3f} {2 * weights.nbytes / seconds / 1e12:6.2f}")
    wrong = 0
    for dtype, block in BLOCK_FORMATS.items():
        for rule in block.rules:
            quantisation = Quantisation(dtype, rule)
            matrices = outputs(weights, quantisation)
            flags = torch.zeros(len(matrices), dtype=torch.int32, device="cuda")
            kernel = KernelQuantise(matrices, quantisation, flags)
            seconds = median_s(kernel.run, args.rounds)
            moved = sum(part.nbytes for each in matrices for part in (each.weights, each.codes, each.scales))
            right = all(is_right(matrices[number], quantisation) for number in (0, -1))
            wrong += not right
            name = f"{dtype} {rule}"
            print(f"{name:26} {seconds * 1e3:8.3f} {moved / seconds / 1e12:6.2f}{'' if right else '  WRONG'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
