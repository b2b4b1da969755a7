"""A session: the process group, the device, the result file and the watchdog of one torchrun job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from refit.bench.clock import StartClock
from refit.bench.environment import manifest
from refit.bench.watchdog import Failure, Watchdog
from refit.config.gpus import GpuMap
from refit.config.registry import METHODS
from refit.config.scenario import Scenario
from refit.errors import UnavailableError, UsageError
from refit.report.terminal import live
from refit.report.terminal.console import show_aside, show_text
from refit.results import result
from refit.results.result import Environment, MeasurementResult, ResultFile
from refit.transport.ranks import Ranks, gpus_here


@dataclass(frozen=True, slots=True)
class Session:
    """What a rank needs to take part in a run.

    `ranks` are all ranks of the job. `control` carries the suite's own messages (barriers, gathered samples) and never
    weights. `on_phase` is told the name of each phase that this rank enters. `publish` writes a measurement's result so
    far to the result file. `start` times the phases up to the first refit. `measured` has the results of the
    measurements that this run has taken before, by name.
    """

    scenario: Scenario
    ranks: Ranks
    device: torch.device
    control: dist.ProcessGroup
    environment: Environment
    on_phase: Callable[[str], None] = lambda _: None
    publish: Callable[[MeasurementResult], None] = lambda _: None
    start: StartClock = field(default_factory=StartClock)
    measured: Mapping[str, MeasurementResult] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.size

    @property
    def is_reporter(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def ranks_per_node(self) -> int | None:
        """Ranks on each host; None on a single one, where all replicas are equally near.

        Raises UsageError where ranks do not fill the hosts in order.
        """
        per_host = self.ranks.ranks_per_host
        return per_host if per_host < self.world_size else None

    @property
    def gpus(self) -> GpuMap:
        """Which ranks share a GPU."""
        return GpuMap(self.ranks_per_node or self.world_size, self.scenario.ranks_per_gpu)

    @property
    def is_gpu_shared(self) -> bool:
        return self.device.type == "cuda" and self.gpus.is_shared

    def on_gpus(self, of_rank: Sequence[int | None]) -> tuple[int | None, ...]:
        """For each rank the bytes of all ranks of its GPU, where they share it; `of_rank` itself elsewhere."""
        if not self.is_gpu_shared:
            return tuple(of_rank)
        gpus = self.gpus
        held = [(gpus.gpu_of(rank), nbytes or 0) for rank, nbytes in enumerate(of_rank)]
        return tuple(sum(nbytes for gpu, nbytes in held if gpu == own) for own, _ in held)

    def enter(self, phase: str, shown: str | None = None) -> None:
        """Enter a phase. A terminal shows its name with the seconds it has taken, or `shown`, which stands still.

        A thread would draw the seconds, and must not run while a refit is timed.
        """
        self.on_phase(phase)
        if self.is_reporter:
            live.draw(shown or phase, ticking=shown is None)

    def say(self, text: str) -> None:
        if self.is_reporter and text:
            show_text(text)


@dataclass(frozen=True, slots=True)
class Launch:
    """A session with its watchdog and its result file. `file` is None on all ranks but 0."""

    session: Session
    watchdog: Watchdog
    file: ResultFile | None


def device_for(scenario: Scenario) -> torch.device:
    """The device on which this rank's weights are: that which the scenario asks for, or its method's default.

    Raises UnavailableError, on every rank, where those are GPUs and this host has too few.
    """
    shared = scenario.ranks_per_gpu
    if (scenario.device or METHODS[scenario.method].device) == "cpu":
        if shared > 1:
            raise UnavailableError(
                f"--ranks-per-gpu {shared} places ranks on GPUs, this machine has none: leave it out"
            )
        return torch.device("cpu")
    gpus, num_gpus = gpus_here(shared), torch.cuda.device_count()
    # With --gpus-per-task, Slurm shows each task its own GPU only. For torchrun's ranks, one GPU means too few.
    if num_gpus == 1 and os.environ.get("SLURM_LOCALID") == os.environ.get("LOCAL_RANK"):
        return torch.device("cuda", 0)
    if gpus.gpus_per_host > num_gpus:
        needed = "one per rank" if shared == 1 else f"one for each {shared} ranks"
        share = f"give --ranks-per-gpu {-(-gpus.ranks_per_host // num_gpus)} with cuda-ipc, " if num_gpus else ""
        raise UnavailableError(
            f"--refit-method {scenario.method} on GPUs needs {needed}, this machine has {num_gpus} for "
            f"{gpus.ranks_per_host} ranks: {share}start fewer, or use --refit-method gloo or shm on CPUs"
        )
    return torch.device("cuda", gpus.device_of(int(os.environ.get("LOCAL_RANK", "0"))))


def meet(timeout_s: float) -> Ranks:
    """The ranks that torchrun has started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set), without a process group.

    Collective: every rank of the job. Raises RefitError, naming the rank, where one does not come within `timeout_s`.
    """
    if os.environ.get("RANK") == "0":
        live.draw(f"connecting {os.environ.get('WORLD_SIZE', '')} ranks")
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    ranks = Ranks.meet(rank, size, store)
    # Where rank 0 hosts the store, as under srun, it must not end before all others have read.
    store.set(f"refit/met/{rank}", "")
    if rank == 0:
        store.wait([f"refit/met/{other}" for other in range(size)])
    return ranks


@contextmanager
def launched(scenario: Scenario, ranks: Ranks) -> Iterator[Launch]:
    """The session of `ranks`, which have met (`meet`).

    Collective: every rank of the job. On exit the process group is destroyed. Raises UsageError for `--profile-refit`
    on CPUs, and UnavailableError where this rank has no GPU that it needs.
    """
    device = device_for(scenario)
    if scenario.profile and device.type != "cuda":
        raise UsageError(
            "--profile-refit records what GPUs do, and this run is on CPUs: leave it out, each refit's line has its "
            "phases"
        )
    start = StartClock()
    start.enter("process group")
    group: dict[str, Any] = {
        "store": ranks.store,
        "rank": ranks.rank,
        "world_size": ranks.size,
        "timeout": (timeout := timedelta(seconds=scenario.timeout_s)),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if gpus_here(scenario.ranks_per_gpu).is_shared:  # NCCL refuses two ranks on one GPU
            dist.init_process_group("cpu:gloo,cuda:gloo", **group)
        else:
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **group)
        control = dist.new_group(backend="gloo", timeout=timeout)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        dist.init_process_group("gloo", **group)
        control = dist.group.WORLD
    assert control is not None
    name = scenario.run_name or result.default_name(scenario)
    file = ResultFile.create(scenario.output_dir, name) if ranks.rank == 0 else None
    if file is not None:  # a run that ends at once still says what it was
        file.write(result.Result(file.run_id, started=result.now(), world_size=ranks.size, scenario=scenario))
    # Result files have the environment of rank 0, and asking Git on every rank would take longer than to connect them.
    shared = (file, manifest()) if file is not None else None
    path, environment = _from_rank_0(shared, control)

    def mark(failure: Failure) -> None:
        # Rank 0 may have written a measurement over what another rank has marked.
        if file is not None:
            file.mark_failed(failure.exit_code, _recorded(failure))

    watched = replace(ranks, store=_own_store())
    watchdog = Watchdog(watched, scenario.timeout_s, lambda failure: _report(path, failure), on_exit=mark)
    watchdog.start()
    try:
        session = Session(scenario, ranks, device, control, environment, watchdog.phase, start=start)
        yield Launch(session, watchdog, file)
    finally:
        watchdog.stop()
    dist.destroy_process_group()


def _from_rank_0(
    value: tuple[ResultFile, Environment] | None, group: dist.ProcessGroup
) -> tuple[ResultFile, Environment]:
    """What rank 0 gives, on every rank. Collective: every rank of `group`."""
    shared = [value]
    dist.broadcast_object_list(shared, group=group)
    assert shared[0] is not None
    return shared[0]


def new_session(scenario: Scenario, device: torch.device, control: dist.ProcessGroup) -> Session:
    """A session on process groups that exist already. Collective: every rank of the default group."""
    return Session(scenario, Ranks.of_default_group(), device, control, manifest())


def _own_store() -> Store:
    """A separate store client for the watchdog: the default store's client serves one caller at a time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))


def _report(file: ResultFile, failure: Failure) -> None:
    """Print a failure once, for all ranks, and record it in the result. Measurements so far stay in the result.

    Ranks that have lost the store cannot agree on the one that reports, so the first to mark the result file does.
    """
    try:
        if not file.mark_failed(failure.exit_code, _recorded(failure)):
            return
    except OSError as error:  # a full disk, or a folder that only the first node has
        live.clear(others=True)
        show_aside(f"FAILED: {failure}")
        show_text(f"Result: {file.path} could not be completed: {error}")
        return
    live.clear(others=True)
    show_aside(f"FAILED: {failure}")
    show_text(f"Result: {file.path}")


def _recorded(failure: Failure) -> result.Failure:
    return result.Failure(failure.message, failure.rank, failure.phase)
