"""What a launcher does: it says which command starts the ranks of one scenario, and on what it starts them."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import refit
from refit.errors import UsageError
from refit.launch.host import Host
from refit.results.sweep import Attempt

ROOT = Path(refit.__file__).resolve().parents[1]
"""The checkout; in an installed wheel the folder that has the package."""

INTERFACE = 1
"""Version of this interface, for launchers from elsewhere."""


@dataclass(frozen=True, slots=True)
class Job:
    """The ranks of one attempt at a scenario: `ranks_per_node` on each of `nodes`, with `flags` of benchmark_refit.py.

    `stem` is the path of the attempt's files without suffix. Ranks write their own logs below `<stem>_ranks/node<N>`.
    `run_id` is the sweep that it is of. `timeout_s` is the longest time that the ranks may take, 0: no limit.
    """

    nodes: int
    ranks_per_node: int
    stem: Path
    flags: tuple[str, ...]
    run_id: str = ""
    timeout_s: int = 0

    @property
    def rank_logs(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}_ranks")


class Launcher(ABC):
    """One way to start ranks, made once for a sweep.

    One that `keeps_time` ends the ranks of a job after its `timeout_s` itself, with TIMED_OUT. One that `brings_nodes`
    asks for as many as each scenario needs, `gpus_per_node` GPUs each, so that a sweep is not within an allocation.
    """

    keeps_time = False
    brings_nodes = False

    def __init__(self, host: Host, environ: Mapping[str, str]) -> None:
        """`host` runs commands where launchers may; `environ` are this process's variables."""
        self.host = host
        self.environ = environ

    @abstractmethod
    def command(self, job: Job) -> Sequence[str]:
        """The command line that starts the ranks of `job` and ends when they have.

        Raises UsageError where there are too few nodes.
        """

    @property
    def gpus_per_node(self) -> int | None:
        """GPUs of a node, where the launcher knows."""
        return None

    def check(self, cluster: str | None, jobs: Sequence[Job]) -> None:  # noqa: B027 - most have nothing to check
        """Raise UsageError for what cannot be started on nodes of `cluster`, before anything is."""

    def goes_on(self, attempt: Attempt) -> bool:
        """Whether what an earlier process started for an attempt is still there, so that `command` waits for it."""
        return False

    def manifests(self, cluster: str | None, jobs: Sequence[Job]) -> tuple[str, str]:
        """What would be submitted, as text, and a note or "". Raises UsageError as `check`, or where nothing is."""
        raise UsageError("this launcher submits nothing: `refit sweep plan` plans, `refit sweep run` runs")

    def submit(self, job: Job) -> str:
        """Submit a job without waiting, and write what was submitted to the attempt's log. Returns its name.

        Raises UsageError where the launcher submits nothing.
        """
        raise UsageError("this launcher submits nothing: `refit sweep run` runs, for Slurm the scripts have --submit")

    def cancel(self, run_id: str) -> list[str]:
        """End all jobs of a run, and return their names. Raises UsageError where the launcher submits nothing."""
        raise UsageError("this launcher submits nothing: end `refit sweep run` with Ctrl-C, jobs of Slurm with scancel")

    @property
    def python(self) -> str:
        """The Python of the ranks: REFIT_PYTHON, else the one that runs this."""
        return self.environ.get("REFIT_PYTHON") or sys.executable

    def number(self, name: str, default: int) -> int:
        """A number from the environment. Raises UsageError where the variable is none."""
        text = self.environ.get(name) or str(default)
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise UsageError(f"{name} must be a whole number, not {text!a}")
        return int(text)


def preload(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that load the library of REFIT_NVSHMEM_LIBRARY into ranks; none where it is not set."""
    library = environ.get("REFIT_NVSHMEM_LIBRARY")
    if not library:
        return {}
    known = environ.get("LD_LIBRARY_PATH")
    return {"LD_PRELOAD": library, "LD_LIBRARY_PATH": os.path.dirname(library) + (f":{known}" if known else "")}
