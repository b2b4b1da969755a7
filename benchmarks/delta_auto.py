"""Full refits, deltas and `auto` in turn, in one run: `python -m benchmarks.delta_auto`.

One rank sends to another, over Gloo. At each share of changed weights every refit is made three times, by a program
that sends everything, by one that sends changes and by `auto`, which takes the faster in the end. The order rotates.
Values are sent, so that a program finds the changes of the same refit there or not: it does the same work. The first of
each turn is verified, every element. Printed are medians, and that of `auto` over the faster of the other two.

    python -m benchmarks.delta_auto                                        on CPUs, 0.09 GB
    python -m benchmarks.delta_auto --method shm
    python -m benchmarks.delta_auto --device cuda --share 1                3 GB, two ranks that share one GPU
"""

from __future__ import annotations

import argparse
import os
import sys
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from refit.bench import oracle
from refit.bench.clock import time_run
from refit.bench.engines.refit import PlannedEngine
from refit.bench.exchange import gather
from refit.bench.launcher import load_libraries
from refit.bench.session import new_session
from refit.bench.sides import build_side
from refit.cli.parsing import parse
from refit.predict.sides import plan_sides
from tests.ranks.pool import RankPool

WAYS = {"full": "identity", "delta": "delta", "auto": "auto"}
SHARES = ("0.1", "1", "5", "20", "50")
NUM_WARMUP = 7
"""Refits until `auto` has tried both ways and keeps what it builds on."""

LIMIT = {"cpu": 1.15, "cuda": 1.05}
"""What `auto` may take, over the faster of the two."""

MODEL = (
    "--model=tiny_qwen3_moe --hidden-size=1024 --num-attention-heads=16 --kv-channels=64 --moe-ffn-hidden-size=1024 "
    "--vocab-size=8192 --source-world-size=1 --rl-inference-tensor-model-parallel-size=1"
)
ON = {"cpu": "--device=cpu --num-layers=1", "cuda": "--device=cuda --ranks-per-gpu=2 --num-layers=53"}


def flags_of(way: str, method: str, device: str, share: str) -> list[str]:
    encoding = f"--refit-encoding={WAYS[way]}" + (f" --delta-changed-share={share}%" if way != "full" else "")
    return f"{MODEL} {ON[device]} --refit-method={method} {encoding}".split()


def in_turn(rank: int, method: str, where: str, share: str, rounds: int) -> tuple[dict[str, list[float]], int, int]:
    """Seconds of the slowest rank of each timed refit by way, wrong elements here, and bytes of a full refit."""
    device = torch.device("cuda", 0) if where == "cuda" else torch.device("cpu")
    if where == "cuda":
        torch.cuda.set_device(device)
    assert dist.group.WORLD is not None
    scenarios = {way: parse(flags_of(way, method, where, share)).scenario for way in WAYS}
    session = new_session(scenarios["delta"], device, dist.group.WORLD)
    source, destination = (build_side(session, name) for name in ("source", "destination"))
    programs, nbytes = {}, 0
    for way, scenario in scenarios.items():
        planned = plan_sides(source.sharding, destination.sharding, destination.spec, None, scenario.sending)
        engine = PlannedEngine(scenario, device)
        engine.connect(planned, session.ranks)
        programs[way], nbytes = engine.prepare(planned, source, destination), planned.cost.wire_bytes
    part, wrong = oracle.part_of(scenarios["delta"]), 0
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    if destination.weights is not None:
        oracle.poison(destination.weights)
    for number in range(NUM_WARMUP + rounds):
        if source.weights is not None:
            oracle.fill(source.weights, number, part)
        order = [*WAYS][number % len(WAYS) :] + [*WAYS][: number % len(WAYS)]
        for way in order:
            took = max(gather(session.control, time_run(programs[way], session.control, device).seconds))
            if number >= NUM_WARMUP:
                seconds[way].append(took)
            if way == order[0] and destination.weights is not None:
                found = oracle.check(destination.weights, source.sharding.tensors, number, part=part)
                wrong += found.num_wrong
    for program in programs.values():
        program.close()
    return seconds, wrong, nbytes


def main() -> int:
    """Print a row per share. Returns 1 where an element was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=[*ON], default="cpu", help="default: cpu")
    parser.add_argument("--method", default="gloo", help="default: gloo")
    parser.add_argument("--share", action="append", metavar="PERCENT", help=f"default: {', '.join(SHARES)} in turn")
    parser.add_argument("--rounds", type=int, default=9, help="timed refits of each way; default: 9")
    args = parser.parse_args()
    shares = args.share or SHARES
    if args.device == "cpu":  # a process that has begun to use a GPU cannot fork ranks that do
        load_libraries(parse(flags_of("delta", args.method, args.device, shares[0])).scenario)
    os.environ.update(LOCAL_WORLD_SIZE="2")
    num_wrong = 0
    for number, share in enumerate(shares):
        ranks = RankPool(2)
        try:
            answers: Any = ranks.run(in_turn, args.method, args.device, share, args.rounds, timeout_s=1800.0)
        finally:
            ranks.stop()
        seconds, _, nbytes = answers[0]
        num_wrong += sum(wrong for _, wrong, _ in answers)
        if number == 0:
            print(f"{nbytes / 1e9:.2f} GB over {args.method}, {args.rounds} refits each, medians in ms")
            print(f"{'changed':>8} {'full':>9} {'delta':>9} {'auto':>9}  full/delta  auto/faster  load")
        ms = {way: 1e3 * median(found) for way, found in seconds.items()}
        ratio = ms["auto"] / min(ms["full"], ms["delta"])
        verdict = "" if ratio <= LIMIT[args.device] else f"  above {LIMIT[args.device]}"
        print(
            f"{share:>6} % {ms['full']:9.1f} {ms['delta']:9.1f} {ms['auto']:9.1f} {ms['full'] / ms['delta']:11.2f} "
            f"{ratio:12.2f} {os.getloadavg()[0]:5.1f}{verdict}",
            flush=True,
        )
    print(f"{num_wrong} elements wrong")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
