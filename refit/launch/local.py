"""Ranks on this machine, as `refit run` starts them."""

from __future__ import annotations

from collections.abc import Sequence

from refit.errors import UsageError
from refit.launch.base import Job, Launcher, preload


class LocalLauncher(Launcher):
    """One `refit run` starts all ranks, with torchrun, which keeps a log of each.

    `start` is how (`refit run --start`).
    """

    start = "spawn"

    def command(self, job: Job) -> Sequence[str]:
        if job.nodes > 1:
            raise UsageError(f"{job.nodes} nodes needed, this is one machine: use fewer ranks, or the launcher slurm")
        logs = job.rank_logs / "node0"
        logs.mkdir(parents=True, exist_ok=True)
        variables = {
            "OMP_NUM_THREADS": self.environ.get("OMP_NUM_THREADS") or "1",
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank${rank}]:",  # before each line of a rank's stderr
            "PET_LOG_DIR": str(logs),  # torchrun's --log-dir and --tee
            "PET_TEE": "2",
            **preload(self.environ),
        }
        words = [self.python, "-m", "refit", "run", "--start", self.start]
        words += ["--nproc-per-node", str(job.ranks_per_node), *job.flags]
        return ["env", *(f"{name}={value}" for name, value in variables.items()), *words]
