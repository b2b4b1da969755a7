"""Ports for ranks that meet as tasks of a Slurm step do."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

from refit.cli.launch import rendezvous_port


def job_with_a_free_port(step: int) -> str:
    """A Slurm job's number, whose port in that step nothing listens on.

    No kernel gives such a port away by itself, and other tests at the same time begin with another job.
    """
    for job in map(str, itertools.count(os.getpid())):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", rendezvous_port({"SLURM_JOB_ID": job, "SLURM_STEP_ID": str(step)})))
            return job
    raise AssertionError("counting never ends")
