"""The speed of the CPU transports relative to the hardware: `python -m benchmarks.transport_speed`.

Four source ranks refit two destination ranks, about 250 MB each, with 64 experts. In the case "whole" EP changes:
experts are sent as they are in memory, and dense weights are resharded. In the case "recut" ETP changes too: every
second projection is a column cut, a third of all bytes. Gloo is compared with bare Gloo sends of the same bytes per
pair, one contiguous message each. Shared memory is compared with `memcpy` of the same bytes, divided evenly over the
same number of processes. A time is that of the slowest rank from a common barrier on. The refit and its yardstick
alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from refit.config.layout import Layout
from refit.plan.plan import RefitPlan
from refit.transport.base import TransportOptions, get_transport
from refit.transport.ranks import Ranks
from tests.ranks.pool import RankPool
from tests.transport.synthetic import Case, own

TARGET = Layout(2, 1, 2, 1, 2, first_rank=4)
CASES = {
    "whole": Case(Layout(4, 2, 2, 1, 4), TARGET, hidden=1024, ffn=1280, experts=64),
    "recut": Case(Layout(4, 4, 1, 1, 4), TARGET, hidden=1024, ffn=1280, experts=64),
}
NUM_RANKS = 6
STAGING_BYTES = 64 << 20


@dataclass(frozen=True)
class Row:
    """One comparison. `needed` is the ratio to reach. `peak_extra_bytes` is this rank's peak beyond its weights."""

    name: str
    yardstick: str
    needed: float
    refit_s: list[float]
    yardstick_s: list[float]
    staging_bytes: int
    peak_extra_bytes: int

    @property
    def ratio(self) -> float:
        return statistics.median(self.yardstick_s) / statistics.median(self.refit_s)


def measure(rank: int, mix: str, method: str, buffers: str, num_rounds: int) -> Row:
    case = CASES[mix]
    plan = case.plan
    source, destination = case.memory(case.source, rank), case.memory(case.destination, rank)
    yardstick = bare_gloo(plan, rank) if method == "gloo" else plain_memcpy(plan)
    yardstick()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = _memory_bytes("VmRSS")
    options = TransportOptions(staging_bytes=STAGING_BYTES, timeout_s=60.0, own=own(method, buffers))
    program = get_transport(method).prepare(plan, Ranks.of_default_group(), source, destination, options)
    program.run()
    program.run()
    peak_extra_bytes = _memory_bytes("VmHWM") - before
    refit_s, yardstick_s = [], []
    for _ in range(num_rounds):
        yardstick_s.append(_slowest(yardstick))
        refit_s.append(_slowest(program.run))
    staging_bytes = program.staging_bytes
    program.close()
    names = {"gloo": ("bare Gloo", 0.8), "shm": ("memcpy", 0.5)}
    return Row(
        f"{mix} {method} {buffers}".removesuffix(" -"),
        *names[method],
        refit_s,
        yardstick_s,
        staging_bytes,
        peak_extra_bytes,
    )


def bare_gloo(plan: RefitPlan, rank: int) -> Callable[[], object]:
    """One contiguous message per pair, all posted at once."""
    wire = plan.is_wire
    sends, receives = {}, {}
    for destination in plan.destination_sharding.ranks:
        for source in plan.source_sharding.ranks:
            pair = wire & (plan.source == source) & (plan.destination == destination)
            nbytes = int(plan.nbytes[pair].sum())
            if rank == source:
                sends[destination] = torch.ones(nbytes, dtype=torch.uint8)
            if rank == destination:
                receives[source] = torch.ones(nbytes, dtype=torch.uint8)

    def run() -> None:
        works = [dist.irecv(data, peer) for peer, data in receives.items()]
        works += [dist.isend(data, peer) for peer, data in sends.items()]
        for work in works:
            assert work is not None
            work.wait()

    return run


def plain_memcpy(plan: RefitPlan) -> Callable[[], object]:
    """This process's share of all bytes, from private memory to private memory."""
    share = int(plan.nbytes.sum()) // NUM_RANKS
    source, destination = torch.ones(share, dtype=torch.uint8), torch.zeros(share, dtype=torch.uint8)
    return lambda: ctypes.memmove(destination.data_ptr(), source.data_ptr(), share)


def _slowest(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return float(elapsed)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed refits of each kind")
    rounds = parser.parse_args().rounds
    print(f"# 4 -> 2 ranks, staging at most {STAGING_BYTES >> 20} MiB per rank, median of {rounds}")
    print(
        f"{'refit':<18}{'ms':>8}{'GB/s':>7}  {'yardstick':<10}{'ms':>8}{'ratio':>7}{'range':>12}{'needed':>8}"
        f"{'staging':>12}{'peak extra':>12}"
    )
    pool = RankPool(NUM_RANKS)
    try:
        for mix, (method, buffers) in itertools.product(CASES, (("gloo", "-"), ("shm", "ring"), ("shm", "direct"))):
            rows = pool.run(measure, mix, method, buffers, rounds)
            _print_row(
                rows[0], CASES[mix].plan, max(r.staging_bytes for r in rows), max(r.peak_extra_bytes for r in rows)
            )
    finally:
        pool.stop()


def _print_row(row: Row, plan: RefitPlan, staging_bytes: int, peak_extra_bytes: int) -> None:
    refit_s, yardstick_s = statistics.median(row.refit_s), statistics.median(row.yardstick_s)
    print(
        f"{row.name:<18}{refit_s * 1e3:>8.1f}{plan.nbytes.sum() / refit_s / 1e9:>7.2f}  {row.yardstick:<10}"
        f"{yardstick_s * 1e3:>8.1f}{row.ratio:>7.2f}{_ratio_range(row):>12}{row.needed:>8.2f}"
        f"{staging_bytes / 2**20:>8.1f} MiB{peak_extra_bytes / 2**20:>8.1f} MiB"
    )


def _ratio_range(row: Row) -> str:
    """The smallest and the largest ratio of the yardstick's time to that of the refit just after it."""
    ratios = [yard / refit for yard, refit in zip(row.yardstick_s, row.refit_s, strict=True)]
    return f"{min(ratios):.2f}-{max(ratios):.2f}"


if __name__ == "__main__":
    main()
