"""NIXL beside the other methods of CPUs: `python -m benchmarks.nixl_speed [--rounds 9] [--part host|hosts|border]`.

host: what `benchmarks.transport_speed` moves (four sources refit two destinations, about 250 MB each; in "recut" a
third are column cuts), by Gloo, by rings in shared memory and by NIXL, between them `memcpy` of the same bytes, divided
evenly, and NIXL's own write of the same bytes per pair, contiguous, one write each. All take turns in one run. CPU
seconds are those of all ranks together.

hosts: the same between two network namespaces, sources in one, destinations in the other, over a link without a limit
(root). Both have one kernel, so UCX is told to use TCP, which is what it takes between machines without RDMA.

border: one source writes columns of a matrix to one destination, in runs of a given length, in place by one descriptor
for each run, and through staging.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.transport_speed import CASES, NUM_RANKS, STAGING_BYTES, plain_memcpy
from refit.copies.batch import CopyBatch
from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.transport.base import TransportOptions, get_transport
from refit.transport.one_sided.executor import Backoff
from refit.transport.one_sided.nixl import buffers
from refit.transport.one_sided.nixl.library import agent
from refit.transport.one_sided.nixl.memory import NixlMemory, NixlPut
from refit.transport.one_sided.nixl.options import DEFAULT_BACKEND
from refit.transport.one_sided.peer_memory import Counter
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from tests.hosts.network import Network, unavailable
from tests.ranks.pool import RankPool
from tests.transport.synthetic import Case, memory_of

OPTIONS = TransportOptions(staging_bytes=STAGING_BYTES, timeout_s=60.0)
WITHIN = ("gloo", "shm", "nixl", "memcpy", "bare NIXL")
BETWEEN = ("gloo", "nixl", "bare NIXL")
MATRIX_BYTES = 64 << 20
RUN_BYTES = [1 << shift for shift in range(10, 21)]


@dataclass
class Measured:
    """Of one way: the slowest rank's seconds of each turn, and the CPU seconds of all ranks."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def turns(rank: int, case: Case, ways: tuple[str, ...], num_rounds: int) -> tuple[dict[str, Measured], str, int]:
    """All ways in turn. Also what carried NIXL's bytes, and the tensors that are other after a refit by NIXL than
    after one by Gloo."""
    plan, ranks = case.plan, Ranks.of_default_group()
    source, destination = case.memory(case.source, rank), case.memory(case.destination, rank)
    for number, shard in enumerate(source or ()):
        shard.view.copy_(torch.arange(shard.view.numel()).view(shard.view.shape).remainder_(251 - number % 100))
    connected = get_transport("nixl").connect(plan, ranks, OPTIONS)
    methods = [name for name in ways if name in ("gloo", "shm", "nixl")]
    programs = {name: get_transport(name).prepare(plan, ranks, source, destination, OPTIONS) for name in methods}
    actions: dict[str, Callable[[], object]] = {name: program.run for name, program in programs.items()}
    actions |= {"memcpy": plain_memcpy(plan), "bare NIXL": bare_nixl(plan, ranks)}
    found = {name: Measured() for name in ways}
    for turn in range(num_rounds + 2):
        for name in ways:
            seconds, cpu_s = _timed(actions[name])
            if turn >= 2:
                found[name].seconds.append(seconds)
                found[name].cpu_s.append(cpu_s)
    programs["gloo"].run()
    by_gloo = [shard.view.clone() for shard in destination or ()]
    for shard in destination or ():
        shard.view.fill_(-99)
    dist.barrier()
    programs["nixl"].run()
    num_wrong = sum(not torch.equal(shard.view, gloo) for shard, gloo in zip(destination or (), by_gloo, strict=True))
    for program in programs.values():
        program.close()
    return found, (connected.words if connected else None) or "", num_wrong


def bare_nixl(plan: RefitPlan, ranks: Ranks) -> Callable[[], object]:
    """One contiguous write per pair of ranks, all started at once. Collective: every rank of the plan."""
    if ranks.rank not in plan.ranks:
        return lambda: None
    memory = NixlMemory(Rendezvous(ranks, "bare", plan.ranks, 60.0), agent(DEFAULT_BACKEND), torch.device("cpu"), 60.0)
    wire, sends, receives = plan.is_wire, {}, {}
    for source, target in np.unique(np.stack([plan.source, plan.destination], axis=1)[wire], axis=0).tolist():
        pair = wire & (plan.source == source) & (plan.destination == target)
        nbytes = int(plan.nbytes[pair].sum())
        if ranks.rank == source:
            sends[target] = torch.ones(nbytes, dtype=torch.uint8)
        if ranks.rank == target:
            receives[source] = torch.zeros(nbytes, dtype=torch.uint8)
    kept = [*sends.values(), *receives.values()]  # NIXL keeps no memory alive
    registered = memory.register(kept)
    device = registered.regions[0].device
    places = {peer: data.data_ptr() for peer, data in receives.items()}
    hello = memory.exchange((memory.inbox, memory.offered(registered), places, device), sorted({*sends, *receives}))
    for peer, (inbox, offered, *_) in hello.items():
        memory.meet(peer, inbox, offered)
    puts = {}
    for peer, data in sends.items():
        row = np.array([[data.data_ptr(), data.numel(), device]], dtype=np.uint64)
        theirs = np.array([[hello[peer][2][ranks.rank], data.numel(), hello[peer][3]]], dtype=np.uint64)
        write = memory.write(memory.listed(None, row), memory.listed(peer, theirs), np.zeros(1, dtype=np.int32))
        puts[peer] = NixlPut(CopyBatch(()), write=write)
    number = 0

    def run() -> None:
        nonlocal number
        assert kept
        number += 1
        for peer, put in puts.items():
            memory.send(peer, put, number)
        backoff = Backoff(60.0)
        for peer in receives:
            while not memory.reached(peer, Counter.ARRIVED, number):
                backoff.wait(ranks.rank, peer)
        memory.finish()

    return run


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """The slowest rank's seconds from a common barrier on, and the CPU seconds of all."""
    dist.barrier()
    cpu, start = time.process_time(), time.perf_counter()
    action()
    seconds, used = torch.tensor(time.perf_counter() - start), torch.tensor(time.process_time() - cpu)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(used)
    return float(seconds), float(used)


def columns(run_bytes: int) -> RefitPlan:
    """Rank 1 gets the left half of the columns of a matrix that rank 0 holds, in runs of `run_bytes`."""
    shape = MATRIX_BYTES // run_bytes, 2 * run_bytes // 2
    spec = TensorSpec("matrix", shape, "bfloat16")
    left = Box.whole(shape).narrow(1, 0, shape[1] // 2)
    return plan_refit(
        Sharding.from_ranks({0: RankSharding.of([(spec, Box.whole(shape))])}),
        Sharding.from_ranks({1: RankSharding.of([(replace(spec), left)])}),
    )


def border(rank: int, run_bytes: int, num_rounds: int) -> tuple[list[float], list[float]]:
    """Seconds in place and through staging, in turn. The plan's destination is a part, so nothing of it is compared."""
    spec_bytes = {"in place": 1, "staged": 1 << 62}
    plan, ranks = columns(run_bytes), Ranks.of_default_group()
    programs, found = {}, {name: [] for name in spec_bytes}
    source, destination = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
    for name, least in spec_bytes.items():
        buffers.LEAST_RUN_BYTES = least
        programs[name] = get_transport("nixl").prepare(plan, ranks, source, destination, OPTIONS)
    for turn in range(num_rounds + 1):
        for name, program in programs.items():
            seconds, _ = _timed(program.run)
            if turn:
                found[name].append(seconds)
    for program in programs.values():
        program.close()
    return found["in place"], found["staged"]


def print_turns(title: str, plan: RefitPlan, answers: list[tuple[dict[str, Measured], str, int]]) -> dict[str, float]:
    found, way, _ = answers[0]
    nbytes, medians = int(plan.nbytes.sum()), {}
    wrong = sum(number for *_, number in answers)
    print(f"\n# {title}: {nbytes / 1e6:.1f} MB, NIXL over {way}, {wrong} wrong tensors")
    print(f"{'way':<12}{'ms':>8}{'from':>8}{'to':>8}{'GB/s':>7}{'CPU s/GB':>10}")
    for name, each in found.items():
        median = medians[name] = statistics.median(each.seconds)
        low, high = min(each.seconds), max(each.seconds)
        cpu = statistics.median(each.cpu_s) / (nbytes / 1e9)
        times = "".join(f"{1e3 * seconds:>8.1f}" for seconds in (median, low, high))
        print(f"{name:<12}{times}{nbytes / median / 1e9:>7.2f}{cpu:>10.2f}")
    return medians


def print_target(what: str, ratio: float, wanted: float, *, at_least: bool) -> None:
    reached = "reached" if (ratio >= wanted if at_least else ratio <= wanted) else "NOT REACHED"
    print(f"{what}: {ratio:.2f} (at {'least' if at_least else 'most'} {wanted}: {reached})")


def within(num_rounds: int) -> None:
    pool = RankPool(NUM_RANKS)
    try:
        for name, case in CASES.items():
            medians = print_turns(f"{name} within a host", case.plan, pool.run(turns, case, WITHIN, num_rounds))
            print_target("Gloo / NIXL", medians["gloo"] / medians["nixl"], 1.2, at_least=True)
            if name == "whole":
                print_target("NIXL / one bare write", medians["nixl"] / medians["bare NIXL"], 1.1, at_least=False)
    finally:
        pool.stop()


def between(num_rounds: int) -> None:
    """The last two of eight ranks are idle: hosts have equally many."""
    with Network(2, None) as network:
        pool = network.ranks(4)
        try:
            for name, case in CASES.items():
                answers = pool.run(turns, case, BETWEEN, num_rounds)
                medians = print_turns(f"{name} between two namespaces", case.plan, answers)
                print_target("Gloo / NIXL", medians["gloo"] / medians["nixl"], 1.0, at_least=True)
        finally:
            pool.stop()


def borders(num_rounds: int) -> None:
    pool = RankPool(2)
    _print_border("within a host", pool, num_rounds)
    if unavailable() is None:
        with Network(2, None) as network:
            _print_border("between two namespaces", network.ranks(1), num_rounds)


def _print_border(where: str, pool: RankPool, num_rounds: int) -> None:
    print(f"\n# {MATRIX_BYTES >> 20} MiB in runs, one source, one destination, {where}")
    print(f"{'bytes of a run':>14}{'in place ms':>13}{'staged ms':>11}{'staged / in place':>19}")
    try:
        for run_bytes in RUN_BYTES:
            in_place, staged = (statistics.median(each) for each in pool.run(border, run_bytes, num_rounds)[0])
            print(f"{run_bytes:>14}{1e3 * in_place:>13.1f}{1e3 * staged:>11.1f}{staged / in_place:>19.2f}")
    finally:
        pool.stop()


PARTS = {"host": within, "border": borders, "hosts": between}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns; default: 9")
    parser.add_argument("--part", choices=PARTS, help="default: all")
    args = parser.parse_args()
    print(f"# load of the machine before: {os.getloadavg()[0]:.1f}; medians of {args.rounds}")
    for name, part in PARTS.items():
        if name == "hosts" and (reason := unavailable()) is not None:
            print(f"\n# hosts: left out, {reason}")
        elif args.part in (None, name):
            part(args.rounds)


if __name__ == "__main__":
    main()
