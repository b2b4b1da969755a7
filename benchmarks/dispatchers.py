"""Token dispatchers and the whole cycle on the GPUs of one host, with Kimi K2's widths: one command, resumable.

    python -m benchmarks.dispatchers --num-gpus 4 --budget-minutes 25 --output-dir dispatcher_results

The runs that say most come first, so that a budget cut short leaves a table; the next call goes on with the others.
`--cpu` runs the same list with the tiny model on CPU ranks, as a rehearsal; `--list` prints it with the memory that
each run needs. Layers of Transformer Engine are run too where it is installed, and flex with them where NCCL EP can
run. Cells are micro-batches 1 and 4 over EP alone and with TP2; then come the cycle, overlap in the first cell, with
and without delayed weight gradients, and micro-batch 2.

At the end the report is printed and `tables/` has the index and the loss curves. `gpu<N>_dispatchers.jsonl` holds all
results: copied to docs/results, it is what `make results` makes a table from.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.campaign import Case, add_arguments, measure
from refit.errors import UnavailableError
from refit.models.megatron import nccl_ep

WIDTHS = ["--model=kimi_k2", "--num-layers=4", "--moe-layer-freq=([0]*1+[1]*3)"]
WIDTHS += ["--moe-grouped-gemm", "--moe-router-dtype=fp32", "--moe-router-force-load-balancing", "--seq-length=4096"]
TINY = ["--model=tiny", "--moe-router-dtype=fp32", "--moe-router-force-load-balancing", "--seq-length=32"]
EXPERTS_PER_GPU = 16
ARMS = ("alltoall", "allgather")
NCCL_EP = ("flex", "--moe-flex-dispatcher-backend=ncclep", "--moe-expert-rank-capacity-factor=1.5")
"""A further arm of Transformer Engine's layers, where it has NCCL EP, and its flags."""

IMPLEMENTATIONS = {"local": "", "transformer_engine": "TE_"}
"""Layers of Megatron-Core, and what names of runs with them begin with."""

OVERLAP, DELAY = "--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"


@dataclass(frozen=True, slots=True)
class Campaign:
    """What all runs share. `micro_batches` come in the order of their importance. `tp` is that of the second layout, 1
    for none."""

    num_gpus: int
    micro_batches: tuple[int, ...] = (1, 4, 2)
    tp: int = 2
    implementations: tuple[str, ...] = ("local",)
    has_nccl_ep: bool = False
    cpu: bool = False

    @property
    def layouts(self) -> dict[str, list[str]]:
        """Experts over all GPUs, then over those that TP leaves."""
        found = {f"EP{self.num_gpus}": [f"--expert-model-parallel-size={self.num_gpus}"]}
        if self.tp > 1:
            rest = self.num_gpus // self.tp
            sizes = [f"--tensor-model-parallel-size={self.tp}", f"--expert-model-parallel-size={rest}"]
            etp = ["--expert-tensor-parallel-size=1"] if rest > 1 else []
            found[f"TP{self.tp}_EP{rest}"] = [*sizes, "--sequence-parallel", *etp]
        return found

    def cases(self) -> Iterator[Case]:
        """Both arms of each cell: all layouts and layers at the first two micro-batches, then the cycle, overlap, and
        the other micro-batches."""
        first, others = self.micro_batches[:2], self.micro_batches[2:]
        yield from self._cells(first)
        yield self._cycle()
        if not self.cpu and self.num_gpus > 1:  # of experts' exchange with other GPUs
            yield from self._overlapped()
        yield from self._cells(others)

    def _cells(self, micro_batches: Sequence[int]) -> Iterator[Case]:
        for impl, (layout, sizes), micro in itertools.product(
            self.implementations, self.layouts.items(), micro_batches
        ):
            flex = self.has_nccl_ep and impl == "transformer_engine"
            for arm, *flags in (*((arm,) for arm in ARMS), *[NCCL_EP] * flex):
                name = f"{IMPLEMENTATIONS[impl]}{layout}_mb{micro}_{arm}"
                yield Case(name, (*self._common(impl, micro, arm), *flags, *sizes, "--measure=train-step"))

    def _overlapped(self) -> Iterator[Case]:
        """The first cell's first arm with its exchange hidden, and with weight gradients moved behind it as well."""
        layout, sizes = next(iter(self.layouts.items()))
        for impl in self.implementations:
            flags = (*self._common(impl, self.micro_batches[0], ARMS[0]), *sizes, "--measure=train-step", OVERLAP)
            name = f"{IMPLEMENTATIONS[impl]}{layout}_mb{self.micro_batches[0]}_{ARMS[0]}_overlap"
            yield Case(name, flags)
            if impl == "transformer_engine":
                yield Case(f"{name}_delayed", (*flags, DELAY))

    def _cycle(self) -> Case:
        measured = ["--measure=train-step,refit,forward", "--refit-mode=collocated", "--check-forward"]
        measured += [f"--rl-inference-tensor-model-parallel-size={self.num_gpus}"]
        sizes = [f"--expert-model-parallel-size={self.num_gpus}", "--rl-inference-expert-model-parallel-size=1"]
        return Case("cycle", (*self._common(self.implementations[0], 1, ARMS[0]), *sizes, *measured))

    def _common(self, impl: str, micro: int, arm: str) -> list[str]:
        return [
            *(TINY if self.cpu else [*WIDTHS, f"--num-experts={EXPERTS_PER_GPU * self.num_gpus}"]),
            f"--transformer-impl={impl}",
            f"--refit-method={'gloo' if self.cpu else 'nccl'}",
            f"--global-batch-size={max(self.micro_batches) * self.num_gpus}",
            f"--micro-batch-size={micro}",
            f"--moe-token-dispatcher-type={arm}",
        ]


def _has_nccl_ep() -> bool:
    try:
        nccl_ep.check_available()
    except UnavailableError as error:
        print(error)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 2], help="default: 1 4 2")
    parser.add_argument("--tp", type=int, default=2, help="TP of the second layout, 1 for none; default: 2")
    add_arguments(parser, "dispatcher_results")
    args = parser.parse_args()
    engine = not args.cpu and importlib.util.find_spec("transformer_engine") is not None
    implementations = tuple(IMPLEMENTATIONS) if engine else ("local",)
    campaign = Campaign(
        args.num_gpus, tuple(args.micro_batches), args.tp, implementations, engine and _has_nccl_ep(), args.cpu
    )
    return measure(list(campaign.cases()), args, "dispatchers")


if __name__ == "__main__":
    sys.exit(main())
