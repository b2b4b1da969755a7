"""Measures what links between ranks carry, with the transports that refits use: `refit calibrate`, on each rank. And
what a rank reads of its memory and computes, which bounds of serving need.

A measurement is a refit of a tensor from a rank to another. A pattern says which pairs move one at a time:

    one pair     0 -> 1           between hosts: the first rank of two hosts
    both ways    0 <-> 1
    all ranks    0 -> 1 -> 2 -> 0 on every host; between hosts: each rank to the same one of the next host, the last
                 host to the first

The last is what a refit does to the links that ranks of a host share: its speed is the one for `--cluster` files.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from refit.bench.environment import manifest
from refit.bench.exchange import gather
from refit.errors import RefitError, UsageError
from refit.memory.weights import LocalWeights, new_shard
from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.results.calibration import Calibration, Link, Pattern, Speed
from refit.results.result import now
from refit.transport.base import TransportOptions, get_transport
from refit.transport.ranks import Ranks

Pair = tuple[int, int]
"""A rank that sends, and one that receives."""

COLUMNS = 1024
"""Elements of a row. A row is what a message holds at least."""

ROW_BYTES = 2 * COLUMNS
NUM_WARMUP = 2
SMALLER = (1 << 16, 1 << 20, 1 << 24)
"""Bytes beside the most, for one pair: what a refit of little takes."""


def run(within: str, between: str, device_type: str, most_bytes: int, num_times: int, timeout_s: float) -> Calibration:
    """Measure all links, in a process that torchrun started, as `measure` does."""
    device = _device(device_type, timeout_s)
    found = measure(Ranks.of_default_group(), device, within, between, most_bytes, num_times, timeout_s)
    dist.barrier()
    dist.destroy_process_group()
    return found


def measure(
    ranks: Ranks,
    device: torch.device,
    within: str,
    between: str,
    most_bytes: int,
    num_times: int,
    timeout_s: float,
) -> Calibration:
    """Measure all links with these methods. The result is the same on every rank.

    Collective: every rank of the default process group. Raises UsageError where ranks have no links, or do not fill
    hosts in order; RefitError where bytes arrive wrong.
    """
    per_host, num_hosts = ranks.ranks_per_host, len(set(ranks.host_of))
    if ranks.size < 2:
        raise UsageError("refit calibrate: 1 rank has no links: start 2 or more with --nproc-per-node or torchrun")
    if ranks.size != per_host * num_hosts:
        raise UsageError(
            f"refit calibrate: {ranks.size} ranks do not fill {num_hosts} hosts of {per_host}: start {per_host} on each"
        )
    options = TransportOptions(timeout_s=timeout_s)
    speeds = []
    for link, method in ((Link.BETWEEN, between), (Link.WITHIN, within), (Link.COPY, within)):
        for pattern, pairs in _patterns(link, per_host, num_hosts):
            for nbytes in _sizes(pattern, link, most_bytes):
                measured = _Measurement(method, pairs, nbytes, ranks, per_host, device, options)
                speeds.append(measured.speed(link, pattern, num_times))
    own = _own_speeds(device, most_bytes, num_times)
    environment = manifest()
    machine = environment.gpus[0].name if environment.gpus and device.type == "cuda" else environment.cpu
    return Calibration(
        speeds=tuple(speeds),
        num_hosts=num_hosts,
        ranks_per_host=per_host,
        num_times=num_times,
        date=now()[:10],
        machine=machine or platform.machine(),
        commit=environment.commit,
        read_bytes_per_s=own[0],
        bf16_flops_per_s=own[1],
    )


READ = {"cpu": 4, "cuda": 32}
PRODUCT = {"cpu": 1024, "cuda": 8192}
"""By device: how much more is read at a time than is sent, to be beyond its caches, and the size of the matrices that
are multiplied."""


def _own_speeds(device: torch.device, most_bytes: int, num_times: int) -> tuple[float, float]:
    """Bytes per second that a rank reads, and operations per second of its products in BF16, while all ranks do: the
    slowest rank's, each at its best, since bounds are of what hardware can do. Collective: every rank."""
    read = torch.zeros(READ[device.type] * most_bytes // 4, device=device)
    read_s = _least_s(lambda: read.sum(), device, num_times)
    size = PRODUCT[device.type]
    left, right = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_s = _least_s(lambda: left @ right, device, num_times)
    return read.nbytes / read_s, 2 * size**3 / product_s


def _least_s(run: Callable[[], torch.Tensor], device: torch.device, num_times: int) -> float:
    """Collective: every rank, all at the same time."""
    seconds = []
    for _ in range(NUM_WARMUP + num_times):
        dist.barrier()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return float(max(gather(_world(), min(seconds))))


def _device(device_type: str, timeout_s: float) -> torch.device:
    """This rank's device, with the default process group made for it."""
    timeout = timedelta(seconds=timeout_s)
    if device_type == "cpu":
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    return device


def _patterns(link: Link, per_host: int, num_hosts: int) -> Iterator[tuple[Pattern, list[Pair]]]:
    """What can be measured of `link`."""
    every = range(per_host * num_hosts)
    if link is Link.COPY:
        yield Pattern.ALL, [(rank, rank) for rank in every]
        return
    if (num_hosts if link is Link.BETWEEN else per_host) < 2:
        return
    other = per_host if link is Link.BETWEEN else 1
    yield Pattern.PAIR, [(0, other)]
    yield Pattern.BOTH_WAYS, [(0, other), (other, 0)]
    if link is Link.BETWEEN:
        yield Pattern.ALL, [(rank, (rank + per_host) % len(every)) for rank in every]
    else:
        yield Pattern.ALL, [(rank, rank // per_host * per_host + (rank + 1) % per_host) for rank in every]


def _sizes(pattern: Pattern, link: Link, most_bytes: int) -> list[int]:
    smaller = [nbytes for nbytes in SMALLER if nbytes < most_bytes] if pattern is Pattern.PAIR else []
    return [*smaller, max(ROW_BYTES, most_bytes // ROW_BYTES * ROW_BYTES)]


class _Measurement:
    """One plan, bound on this rank. Collective: every rank."""

    def __init__(
        self,
        method: str,
        pairs: Sequence[Pair],
        nbytes: int,
        ranks: Ranks,
        per_host: int,
        device: torch.device,
        options: TransportOptions,
    ) -> None:
        self._method, self._nbytes, self._device = method, nbytes, device
        if not any(ranks.host_of[source] != ranks.host_of[destination] for source, destination in pairs):
            # Hosts for themselves, all at a time: what works within a host only needs a plan without others.
            own = ranks.rank // per_host
            pairs = [pair for pair in pairs if pair[0] // per_host == own] or pairs
        self._plan = _plan(pairs, nbytes)
        rank = ranks.rank
        self._source = _weights(self._plan.source_sharding, rank, device)
        self._destination = _weights(self._plan.destination_sharding, rank, device)
        self._fill()
        self._program = get_transport(method).prepare(self._plan, ranks, self._source, self._destination, options)

    def speed(self, link: Link, pattern: Pattern, num_times: int) -> Speed:
        """Measure, check what has arrived, and release all."""
        seconds = [self._time() for _ in range(NUM_WARMUP + num_times)][NUM_WARMUP:]
        self._check()
        self._program.close()
        return Speed(link, pattern, self._method, self._nbytes, statistics.median(seconds), min(seconds), max(seconds))

    def _time(self) -> float:
        """Seconds of the slowest rank."""
        dist.barrier()
        began = time.perf_counter()
        self._program.run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began
        return float(max(gather(_world(), seconds)))

    def _fill(self) -> None:
        for shard in self._source or ():
            shard.view.fill_(_value(shard.tensor.key))

    def _check(self) -> None:
        """Raise RefitError, the same on every rank, where one has got wrong bytes."""
        received = self._destination or ()
        mine = [each.tensor.key for each in received if not bool((each.view == _value(each.tensor.key)).all())]
        wrong = [key for keys in gather(_world(), mine) for key in keys]
        if wrong:
            raise RefitError(f"{self._method} delivered wrong bytes from rank {wrong[0].replace(' ', ' to ')}")


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _plan(pairs: Sequence[Pair], nbytes: int) -> RefitPlan:
    """A tensor of `nbytes` from the first to the second of each pair."""
    sides: tuple[dict[int, list[tuple[TensorSpec, Box]]], ...] = ({}, {})
    for pair in pairs:
        spec = TensorSpec(f"{pair[0]} {pair[1]}", (nbytes // ROW_BYTES, COLUMNS), "bfloat16")
        for side, rank in zip(sides, pair, strict=True):
            side.setdefault(rank, []).append((spec, Box.whole(spec.shape)))
    source, destination = (
        Sharding.from_ranks({rank: RankSharding.of(held) for rank, held in side.items()}) for side in sides
    )
    return plan_refit(source, destination)


def _weights(sharding: Sharding, rank: int, device: torch.device) -> LocalWeights | None:
    if rank not in sharding.ranks:
        return None
    shards = sharding.of_rank(rank).shards.values()
    return LocalWeights(new_shard(shard.tensor, box, device) for shard in shards for box in shard.boxes)


def _value(key: str) -> int:
    source, destination = map(int, key.split())
    return 1 + (7 * source + destination) % 100
