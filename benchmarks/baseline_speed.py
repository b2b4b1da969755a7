"""Our refit against the baseline, Megatron-Core's own, on CPUs: the same two models in one run, both verified bitwise.

    python -m benchmarks.baseline_speed

4 -> 2 ranks, about 240 MB of weights per destination rank. The baseline uses Gloo, the only transport it has on CPUs;
ours uses Gloo and shared memory. The ratios are those of steady refits (medians) and of cold refits, with planning
and set-up.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ranks import Machine, this_machine
from refit.results.result import Result, read_result

NUM_RANKS = 6
# Grouped experts and an unchanged ETP, which both versions of Megatron-Core refit correctly.
FLAGS = """--model tiny --num-layers 4 --hidden-size 1024 --ffn-hidden-size 2048 --num-experts 16
    --moe-ffn-hidden-size 1024 --moe-shared-expert-intermediate-size 1024 --moe-layer-freq 1 --vocab-size 8192
    --moe-grouped-gemm --tensor-model-parallel-size 2 --expert-model-parallel-size 2
    --rl-inference-tensor-model-parallel-size 2 --rl-inference-expert-model-parallel-size 1
    --num-benchmark-iterations 9 --refit-engine both"""


@dataclass(frozen=True, slots=True)
class Variant:
    """A transport of our refit, with its flags."""

    name: str
    flags: str


VARIANTS = (
    Variant("gloo", "--refit-method gloo"),
    Variant("shm ring", "--refit-method shm --one-sided-buffers ring"),
    Variant("shm direct", "--refit-method shm --one-sided-buffers direct"),
)

WAYS = len("shm direct against gloo") + 1
"""Width of the column that names what moved the bytes of each side."""


def measure(here: Machine, variant: Variant) -> Result:
    """The result of one run. Raises RuntimeError, with its log, where it fails."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        flags = [*shlex.split(FLAGS), *shlex.split(variant.flags), "--output-dir", directory]
        if (code := here.run(flags, NUM_RANKS, folder / "log", None)) != 0:
            raise RuntimeError(f"{variant.name}: exit code {code}\n{(folder / 'log').read_text()}")
        (path,) = folder.glob("*.json")
        return read_result(path)


def row(variant: Variant, result: Result) -> str:
    assert result.refit is not None
    ours, baseline = result.refit.engines["refit"], result.refit.engines["megatron"]
    if ours.median_s is None or baseline.median_s is None:
        return f"{variant.name:<{WAYS}} the baseline did not run: {baseline.reason}"
    ways = f"{variant.name} against {baseline.transport}"
    steady, cold = (ours.median_s, baseline.median_s), (ours.cold_total_s, baseline.cold_total_s)
    return (
        f"{ways:<{WAYS}}{1e3 * steady[0]:>9.1f}{1e3 * steady[1]:>9.1f}{steady[1] / steady[0]:>7.2f}"
        f"{1e3 * cold[0]:>11.1f}{1e3 * cold[1]:>9.1f}{cold[1] / cold[0]:>7.2f}"
        f"{ours.num_wrong:>9,}{baseline.num_wrong:>12,}"
    )


def main() -> int:
    times = f"{'baseline':>9}{'ratio':>7}"
    print(f"{'':<{WAYS}}{'steady (ms)':>18}{'':>7}{'cold (ms)':>20}{'':>7}{'#wrong':>21}")
    print(f"{'transports':<{WAYS}}{'ours':>9}{times}{'ours':>11}{times}{'ours':>9}{'baseline':>12}")
    with this_machine() as here:
        for variant in VARIANTS:
            result = measure(here, variant)
            print(row(variant, result), flush=True)
    assert result.environment is not None
    print(f"# Megatron-Core {result.environment.versions['megatron-core']}, {result.environment.cpu}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
