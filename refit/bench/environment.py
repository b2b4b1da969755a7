"""The environment manifest: versions, hardware and settings, stored with every result."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import refit
from refit.bench.memory import total_memory_bytes
from refit.results.result import Environment, Gpu

PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "nccl-extensions",
    "nvshmem4py-cu13",
    "nixl-cu13",
    "nixl-cu12",
    "transformer-engine",
    "triton",
    "transformers",
    "deepspeed",
)
ALLOWED_VARIABLES = re.compile(
    r"^(NCCL_|NVSHMEM_|GLOO_|UCX_|NIXL_|TORCH_NCCL_|NVTE_|PYTORCH_ALLOC_CONF$|PYTORCH_CUDA_ALLOC_CONF$|"
    r"OMP_NUM_THREADS$|REFIT_START$|CUDA_DEVICE_MAX_CONNECTIONS$|CUDA_VISIBLE_DEVICES$|SLURM_JOB_ID$)"
)
"""Environment variables stored in a result: those that change performance. Others may hold tokens or paths."""


def manifest() -> Environment:
    """Versions, devices, host and settings of this process."""
    return Environment(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions={"python": platform.python_version(), **_package_versions()},
        commit=_commit(),
        host=socket.gethostname(),
        cpu=_cpu_model(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=total_memory_bytes(),
        gpus=_gpus(),
        variables={name: value for name, value in sorted(os.environ.items()) if ALLOWED_VARIABLES.match(name)},
    )


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["refit-benchmark"] = refit.__version__
    megatron = sys.modules.get("megatron.core")
    if megatron is not None:  # the imported version, possibly of a source tree
        versions["megatron-core"] = str(megatron.__version__)
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(map(str, loaded_nccl_version() or torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions


def loaded_nccl_version() -> tuple[int, int, int] | None:
    """The version of the NCCL in this process, None without one.

    torch's own answer is the NCCL that it was built with. Another one may be preloaded.
    """
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return None
    code = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(code))
    return code.value // 10000, code.value // 100 % 100, code.value % 100  # NCCL_VERSION of nccl.h, from 2.9 on


def _commit() -> str | None:
    """The suite's own commit, `-dirty` with uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(Gpu(properties.name, properties.total_memory) for properties in found)
