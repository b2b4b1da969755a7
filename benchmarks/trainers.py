"""Trainers on the GPUs of one host, with Qwen3-32B's widths: one command, resumable.

    python -m benchmarks.trainers --num-gpus 2 --budget-minutes 8 --output-dir trainer_results

Megatron-Core, FSDP2 and AutoTP train 8 layers, with one batch in every layout: over TP and DP (from four GPUs on), over
TP alone, over DP alone. Megatron-Core has its local layers, and those of Transformer Engine where it is installed;
AutoTP is run where DeepSpeed is. Last comes FSDP2 with autocast.

The runs that say most come first, so that a budget cut short leaves a table; the next call goes on with the others.
`--cpu` runs the same list with a tiny model in float32 on CPU ranks, as a rehearsal; `--list` prints it with the memory
that each run needs.

At the end the report is printed and `tables/` has the index and the loss curves. `gpu<N>_trainers.jsonl` holds all
results: copied to docs/results, it is what `make results` makes tables from.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.campaign import Case, add_arguments, measure

WIDTHS = ("--model=qwen3_32b", "--num-layers=8", "--seq-length=2048", "--refit-method=nccl")
TINY = ("--model=tiny_qwen3", "--seq-length=32", "--refit-method=gloo")
STEPS = ("--lr=1e-5", "--weight-decay=0.01", "--clip-grad=1.0", "--seed=42", "--micro-batch-size=1")
"""Those of configs/scenarios/trainers.yaml."""

MAX_TP = 8
MAX_TINY_TP = 4
"""The query groups of both models, which TP divides."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A trainer: its flags, and the package that it needs beside Megatron-Core and transformers."""

    name: str
    flags: tuple[str, ...] = ()
    package: str | None = None
    on_cpu: bool = True


CONTENDERS = (
    Contender("megatron_te", ("--transformer-impl=transformer_engine",), "transformer_engine", on_cpu=False),
    Contender("fsdp2", ("--source-format=fsdp2",)),
    Contender("autotp", ("--source-format=autotp",), "deepspeed"),
    Contender("megatron"),
)
"""In the order of their importance: fewer are ranked where the budget ends."""

AUTOCAST = Contender("fsdp2_autocast", ("--source-format=fsdp2", "--autocast"))


def contenders(*, cpu: bool) -> tuple[Contender, ...]:
    """Those that this machine has the packages of."""
    usable = (each for each in CONTENDERS if each.on_cpu or not cpu)
    return tuple(each for each in usable if each.package is None or importlib.util.find_spec(each.package))


@dataclass(frozen=True, slots=True)
class TrainerCampaign:
    """What all runs share. Every step has two sequences per GPU, so that layouts can be compared too."""

    num_gpus: int
    contenders: tuple[Contender, ...]
    cpu: bool = False

    @property
    def tp_sizes(self) -> list[int]:
        """DP 2 x TP, from four GPUs on, then TP alone, then DP alone."""
        both = [self.num_gpus // 2] if self.num_gpus >= 4 else []
        return list(dict.fromkeys([*both, self.num_gpus, 1]))

    def cases(self) -> Iterator[Case]:
        """All contenders of each layout, then autocast with DP alone."""
        for tp in self.tp_sizes:
            yield from (self._case(tp, contender) for contender in self.contenders)
        yield self._case(1, AUTOCAST)

    def _case(self, tp: int, contender: Contender) -> Case:
        flags = (
            *(TINY if self.cpu else WIDTHS),
            *(["--fp32"] if self.cpu and contender is not AUTOCAST else []),
            *STEPS,
            "--measure=train-step",
            f"--global-batch-size={2 * self.num_gpus}",
            f"--source-world-size={self.num_gpus}",
            f"--tensor-model-parallel-size={tp}",
            *contender.flags,
        )
        return Case(f"TP{tp}_DP{self.num_gpus // tp}_{contender.name}", flags)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "trainer_results")
    args = parser.parse_args()
    max_tp = MAX_TINY_TP if args.cpu else MAX_TP
    if args.num_gpus < 1 or max_tp % args.num_gpus:
        parser.error(
            f"--num-gpus {args.num_gpus} does not divide the model's {max_tp} query groups, as TP has to: give a "
            "divisor of them"
        )
    campaign = TrainerCampaign(args.num_gpus, contenders(cpu=args.cpu), args.cpu)
    return measure(list(campaign.cases()), args, "trainers")


if __name__ == "__main__":
    sys.exit(main())
