"""A session: the process group, the device, the result file and the watchdog of one torchrun job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from refit.bench.environment import manifest
from refit.bench.watchdog import Failure, Watchdog
from refit.config.scenario import Method, Scenario
from refit.errors import UnavailableError, UsageError
from refit.report.console import show
from refit.results.result import Result, ResultFile

GPU_METHODS = (Method.NCCL, Method.NVSHMEM)


@dataclass(frozen=True, slots=True)
class Session:
    """What a rank needs to take part in a run. `file` is None on all ranks but 0; `control` carries the suite's own
    messages (barriers, gathered samples) and never weights. `enter` names the phase this rank is in."""

    scenario: Scenario
    rank: int
    device: torch.device
    control: dist.ProcessGroup
    result: Result
    file: ResultFile | None
    enter: Callable[[str], None]

    @property
    def is_reporter(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.is_reporter and text:
            show(text)

    def save(self) -> None:
        if self.file is not None:
            self.file.write(self.result)


def device_for(method: Method, asked: str | None = None) -> torch.device:
    """The device a method moves weights on, `asked` for where there is a choice.

    Raises UnavailableError where it is to be a GPU and there is none for this rank.
    """
    if method not in GPU_METHODS and asked != "cuda":
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # Slurm can show each of its tasks one GPU, its own (--gpus-per-task); of torchrun's ranks that means too few GPUs.
    if num_gpus == 1 and os.environ.get("SLURM_LOCALID") == os.environ.get("LOCAL_RANK"):
        return torch.device("cuda", 0)
    if local_rank >= num_gpus:
        raise UnavailableError(
            f"--refit-method {method.value} on GPUs needs one per rank, this machine has {num_gpus} for "
            f"{os.environ.get('LOCAL_WORLD_SIZE', '1')} ranks: start fewer, or use --refit-method gloo or shm on CPUs"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def launched(scenario: Scenario) -> Iterator[tuple[Session, Watchdog]]:
    """The session of a process started by torchrun (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set).

    Collective: every rank of the job. On leaving, the process group is gone.
    """
    device = device_for(scenario.method, scenario.device)
    if scenario.profile and device.type != "cuda":
        raise UsageError(
            "--profile-refit records what GPUs do, and this run is on CPUs: leave it out, each refit's line has its "
            "phases"
        )
    timeout = timedelta(seconds=scenario.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        control = dist.new_group(backend="gloo", timeout=timeout)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        dist.init_process_group("gloo", timeout=timeout)
        control = dist.group.WORLD
    assert control is not None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    file = ResultFile.create(scenario.output_dir, _file_name(scenario)) if rank == 0 else None
    shared = [file]
    dist.broadcast_object_list(shared, group=control)
    path = shared[0]
    assert path is not None
    watchdog = Watchdog(_own_store(), rank, num_ranks, scenario.timeout_s, lambda failure: _report(path, failure))
    watchdog.start()
    try:
        yield new_session(scenario, device, control, file, watchdog.phase), watchdog
    finally:
        watchdog.stop()
    dist.destroy_process_group()


def new_session(
    scenario: Scenario,
    device: torch.device,
    control: dist.ProcessGroup,
    file: ResultFile | None,
    enter: Callable[[str], None] = lambda _: None,
) -> Session:
    """A session on process groups that exist already."""
    result = Result(file.run_id if file else "", {}, manifest())
    return Session(scenario, dist.get_rank(), device, control, result, file, enter)


def _own_store() -> Store:
    """A connection of the watchdog's own: the default store's client serves one caller at a time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))


def _report(file: ResultFile, failure: Failure) -> None:
    """Print a failure once, for all ranks, and mark the result; what was measured stays in it."""
    show(f"FAILED: {failure}")
    file.mark_failed(failure.exit_code, {"rank": failure.rank, "phase": failure.phase, "message": failure.message})
    show(f"Result: {file.path}")


def _file_name(scenario: Scenario) -> str:
    """`--run-name`, or `<UTC time>_<scenario>`."""
    if scenario.run_name is not None:
        return scenario.run_name
    words = f"{scenario.title} {scenario.mode.value} {scenario.method.value}".lower().replace("->", "to")
    return "_".join([f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}", *words.split()])
