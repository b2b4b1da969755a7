"""Refits between hosts, with relay and without: `python -m benchmarks.hosts [--turns 3] [--mbit 1000]` (root).

Hosts are network namespaces of this machine, each with a shaped link to one bridge (`tests.hosts.network`). A
Qwen3-MoE of 0.2 GB goes from a host of four ranks to one of four: to a data-parallel engine, and to four engines. Then
from one rank to engines on one host and on four. All arms of a case take turns, so that a busy machine slows all.
Every refit is verified. In each turn one pair of processes also sends 64 MiB over the same link by bare Gloo: the
yardstick of what the link carries.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from refit.bench.launcher import load_libraries
from refit.cli.parsing import parse
from refit.results.refit import RefitResult
from tests.bench.test_runner import run_scenario
from tests.hosts.network import Network, unavailable
from tests.ranks.pool import RankPool

PAIR_BYTES = 64 << 20
REFITS = 3
MODEL = (
    "--model=tiny_qwen3_moe --hidden-size=1024 --num-attention-heads=16 --kv-channels=64 --moe-ffn-hidden-size=1024 "
    f"--vocab-size=22528 --num-benchmark-warmup=1 --num-benchmark-iterations={REFITS} "
    "--rl-inference-format=vllm --rl-inference-tensor-model-parallel-size=1"
)


@dataclass(frozen=True, slots=True)
class Case:
    """Arms by name, each the flags of a scenario, on `num_hosts` of `ranks_per_host`."""

    name: str
    num_hosts: int
    ranks_per_host: int
    arms: dict[str, str]
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The ratio of two arms' times to reach, `slow` over `fast`: at least, or at most."""

    slow: str
    fast: str
    ratio: float
    at_least: bool


FOUR_RANKS = "--source-world-size=4 --expert-model-parallel-size=4"
CASES = (
    Case(
        "vLLM TP1 DP4 EP4 on one host",
        2,
        4,
        {relay: f"{FOUR_RANKS} --rl-inference-data-parallel-size=4 --refit-relay={relay}" for relay in ("off", "node")},
        (Target("off", "node", 2.3, at_least=True),),
    ),
    Case(
        "4 engines of TP1 on one host",
        2,
        4,
        {relay: f"{FOUR_RANKS} --rl-inference-replicas=4 --refit-relay={relay}" for relay in ("off", "node")},
        (Target("off", "node", 3.6, at_least=True),),
    ),
    Case(
        "engines of TP1 on a host each",
        5,
        1,
        {
            "one": "--rl-inference-replicas=1",
            "off": "--rl-inference-replicas=4 --refit-relay=off",
            "engine": "--rl-inference-replicas=4 --refit-relay=engine",
        },
        (Target("engine", "one", 1.3, at_least=False),),
    ),
)


@dataclass(slots=True)
class Measured:
    """Of one arm: seconds of every timed refit, bytes between hosts in one, and wrong elements."""

    seconds: list[float] = field(default_factory=list)
    between_bytes: int = 0
    num_wrong: int = 0


def campaign(case: Case, turns: int, mbit: int, method: str) -> tuple[dict[str, Measured], list[float]]:
    """The arms of `case`, and bytes per second of one pair of processes, one figure per turn."""
    found = {name: Measured() for name in case.arms}
    pair: list[float] = []
    model = f"{MODEL} --refit-method={method}"
    load_libraries(parse(f"{model} {next(iter(case.arms.values()))}".split()).scenario)
    with Network(case.num_hosts, mbit) as network:
        ranks = network.ranks(case.ranks_per_host)
        try:
            for _ in range(turns):
                pair.append(PAIR_BYTES / max(ranks.run(_send_over_the_link, case.ranks_per_host)))
                for name, flags in case.arms.items():
                    _add(found[name], ranks, f"{model} {flags}".split())
        finally:
            ranks.stop()
    return found, pair


def _add(measured: Measured, ranks: RankPool, flags: list[str]) -> None:
    result: Any = ranks.run(run_scenario, flags, timeout_s=600.0)[0].measurements["refit"]
    assert isinstance(result, RefitResult)
    assert result.hosts is not None
    engine = result.engines["refit"]
    measured.seconds += [sample.seconds for sample in engine.samples if not sample.warmup]
    measured.between_bytes = result.hosts.between_bytes
    measured.num_wrong += engine.num_wrong


def _send_over_the_link(rank: int, peer: int) -> float:
    """Rank 0 sends to `peer`, the first of the next host. Returns the receiver's seconds, the second of two times."""
    seconds, buffer = 0.0, torch.ones(PAIR_BYTES if rank in (0, peer) else 0, dtype=torch.uint8)
    for _ in range(2):
        dist.barrier()
        begin = time.perf_counter()
        if rank == 0:
            dist.send(buffer, peer)
        elif rank == peer:
            dist.recv(buffer, 0)
            seconds = time.perf_counter() - begin
    return seconds


def report(case: Case, found: dict[str, Measured], pair: list[float], load: float) -> Iterator[str]:
    link = median(pair)
    yield f"\n{case.name}: load of the machine before {load:.1f}; one pair of processes {link / 1e6:.1f} MB/s"
    for name, arm in found.items():
        seconds = median(arm.seconds)
        speed = arm.between_bytes / seconds
        of_link = f", {speed / 1e6:.1f} MB/s: {100 * speed / link:.0f} % of the pair" if case.num_hosts == 2 else ""
        yield (
            f"  {name:<7} {1e3 * seconds:8.0f} ms median of {len(arm.seconds)} ({1e3 * min(arm.seconds):.0f} to "
            f"{1e3 * max(arm.seconds):.0f}), {arm.between_bytes / 1e6:.1f} MB between hosts{of_link}, "
            f"{arm.num_wrong} wrong"
        )
    for target in case.targets:
        ratio = median(found[target.slow].seconds) / median(found[target.fast].seconds)
        reached = ratio >= target.ratio if target.at_least else ratio <= target.ratio
        limit = "at least" if target.at_least else "at most"
        yield (
            f"  {target.slow} / {target.fast}: {ratio:.2f} ({limit} {target.ratio}: "
            f"{'reached' if reached else 'NOT REACHED'})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="times that every arm runs; default: 3")
    parser.add_argument("--mbit", type=int, default=1000, help="rate of each link, each way; default: 1000")
    parser.add_argument("--method", default="gloo", help="the refit method, as in shm+gloo; default: gloo")
    args = parser.parse_args()
    if (reason := unavailable()) is not None:
        parser.error(reason)
    lines: list[str] = []
    for case in CASES:
        load = os.getloadavg()[0]
        lines += report(case, *campaign(case, args.turns, args.mbit, args.method), load)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
