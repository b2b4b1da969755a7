"""Our refit against the baseline, Megatron-Core's own, on CPUs: the same two models in one run, both verified bitwise.

    python -m benchmarks.baseline_speed

4 -> 2 ranks, about 240 MB of weights per destination rank. The baseline uses Gloo, the only transport it has on CPUs;
ours uses Gloo and shared memory. The ratios are those of steady refits (medians) and of cold refits, with planning
and set-up.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.listed import opened, result_of
from refit.results.result import Result
from refit.results.sweep import attempts
from refit.sweep.selection import Candidate, Selection

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


def measure(folder: Path) -> Iterator[tuple[Variant, Result]]:
    """The result of each variant. Raises RuntimeError, with the log, where one fails."""
    by_name = {variant.name.replace(" ", "_"): variant for variant in VARIANTS}
    flags = shlex.split(FLAGS)
    listed = (Candidate(name, (*flags, *shlex.split(variant.flags))) for name, variant in by_name.items())
    with opened(Selection("baseline speed", tuple(listed)), folder, num_gpus=None) as loop:
        for planned, code in loop.each(loop.pending("unfinished")):
            run_id = loop.sweep.run_id
            if code != 0:
                log = attempts(folder, run_id, planned.name)[-1].log.read_text()
                raise RuntimeError(f"{by_name[planned.name].name}: exit code {code}\n{log}")
            yield by_name[planned.name], result_of(planned, folder, run_id)


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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = list(measure(Path(folder)))
    times = f"{'baseline':>9}{'ratio':>7}"
    print(f"{'':<{WAYS}}{'steady (ms)':>18}{'':>7}{'cold (ms)':>20}{'':>7}{'#wrong':>21}")
    print(f"{'transports':<{WAYS}}{'ours':>9}{times}{'ours':>11}{times}{'ours':>9}{'baseline':>12}")
    for variant, result in measured:
        print(row(variant, result), flush=True)
    assert result.environment is not None
    print(f"# Megatron-Core {result.environment.versions['megatron-core']}, {result.environment.cpu}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
