"""Ranks on the first nodes of this Slurm allocation: one step of `srun` for each attempt.

A site's settings are variables, as docs/slurm.md describes them: REFIT_TASKS, REFIT_SRUN_ARGS, REFIT_CONTAINER_IMAGE
and REFIT_CONTAINER_MOUNTS.
"""

from __future__ import annotations

from collections.abc import Sequence

from refit.errors import UsageError
from refit.launch.base import ROOT, Job, Launcher


class SlurmLauncher(Launcher):
    """One task per GPU where the allocation has several per node, otherwise one per node, which starts torchrun."""

    def command(self, job: Job) -> Sequence[str]:
        # A rank cannot tell a step of a single task from a process of its own, so torchrun starts that one.
        per_gpu = job.nodes * job.ranks_per_node > 1 and self._a_task_per_gpu()
        tasks = job.ranks_per_node if per_gpu else 1
        hosts = self._hosts()
        if len(hosts) < job.nodes:
            raise UsageError(f"{job.nodes} nodes needed, the allocation has {len(hosts)}")
        hosts = hosts[: job.nodes]
        step = [
            f"--nodes={job.nodes}",
            f"--ntasks={job.nodes * tasks}",
            f"--ntasks-per-node={tasks}",
            # Rank r has to be on node r / ranks_per_node, as planned. No task is bound to a GPU: a rank picks its own.
            f"--nodelist={','.join(hosts)}",
            "--distribution=block",
            "--kill-on-bad-exit=1",
            "--export=ALL",
        ]
        if not per_gpu:
            step.append("--cpu-bind=none")  # a site's default may put torchrun and all its ranks on one core
        node = [str(ROOT / "scripts/node.sh"), "gpu" if per_gpu else "node", self.python, str(job.nodes)]
        node += [str(job.ranks_per_node), str(job.rank_logs), *job.flags]
        site = self.environ.get("REFIT_SRUN_ARGS", "").split()
        return ["env", f"MASTER_ADDR={hosts[0]}", "srun", *step, *self._container(job), *site, *node]

    def _a_task_per_gpu(self) -> bool:
        if form := self.environ.get("REFIT_TASKS"):
            return form == "gpu"
        num_nodes = self.number("SLURM_JOB_NUM_NODES", self.number("SLURM_NNODES", 1))
        return self.number("SLURM_NTASKS_PER_NODE", 1) > 1 or self.number("SLURM_NTASKS", 1) > num_nodes

    def _hosts(self) -> list[str]:
        nodes = self.environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise UsageError("no node list in this allocation: SLURM_JOB_NODELIST is not set")
        code, text = self.host.output(["scontrol", "show", "hostnames", nodes])
        if code != 0:
            raise UsageError(f"`scontrol show hostnames {nodes}` failed: {text.strip() or f'exit code {code}'}")
        return text.split()

    def _container(self, job: Job) -> list[str]:
        """Options of srun for the container that ranks run in. The checkout and the results are mounted too."""
        image = self.environ.get("REFIT_CONTAINER_IMAGE")
        if not image:
            return []
        folders = [str(ROOT), str(job.stem.parent.parent)]
        mounts = [*filter(None, [self.environ.get("REFIT_CONTAINER_MOUNTS")]), *(f"{path}:{path}" for path in folders)]
        options = {"image": image, "mounts": ",".join(mounts), "workdir": str(ROOT)}
        return [f"--container-{name}={value}" for name, value in options.items()]
