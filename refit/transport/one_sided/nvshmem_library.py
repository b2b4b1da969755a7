"""The NVSHMEM library in this process: finding, checking, initialising and finalising it."""

from __future__ import annotations

import atexit
import importlib
import os
import re
import sys
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from refit.errors import RefitError, UnavailableError, UsageError, first_line
from refit.transport.rendezvous import Rendezvous

OLDEST_VERSION = (3, 8)
"""Of the library: nvshmem4py 0.4 was built with it and calls its functions. PyTorch 2.11 brings 3.4."""

HEAP_SLACK_BYTES = 256 << 20
SIZE_VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"


@dataclass(slots=True)
class _Process:
    """The state of NVSHMEM, which a process can initialise only once: as PE `pe[0]` of `pe[1]`."""

    pe: tuple[int, int] | None = None
    sized_here: bool = False
    broken: bool = False
    num_open: int = 0
    pooled_bytes: int = 0


_PROCESS = _Process()


def check_available() -> None:
    """Raises UnavailableError that says what is missing and how to get it. Needs no process group."""
    if not torch.cuda.is_available():
        raise UnavailableError("nvshmem needs CUDA GPUs, this machine has none: use --refit-method shm or gloo")
    if find_spec("nvshmem") is None:
        raise UnavailableError(
            "nvshmem needs nvshmem4py, which is not installed: pip install nvshmem4py-cu13, or use --refit-method nccl"
        )
    try:
        version = str(load().get_version().libnvshmem_version)
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            f"nvshmem4py does not load ({first_line(error)}): reinstall it with pip install nvshmem4py-cu13, "
            "or use --refit-method nccl"
        ) from error
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_VERSION:
        raise UnavailableError(
            f"nvshmem needs NVSHMEM {'.'.join(map(str, OLDEST_VERSION))} or newer, {version} is loaded (PyTorch "
            f"brings one of its own): set LD_PRELOAD={_packaged_library()}, or use --refit-method nccl"
        )


def load() -> Any:
    """The module `nvshmem.core`. Raises whatever importing it raises."""
    _alias_cuda_core()
    return importlib.import_module("nvshmem.core")


def start(rendezvous: Rendezvous, heap_bytes: int) -> None:
    """Initialise NVSHMEM, once per process, with PE numbers equal to ranks and a heap of at least `heap_bytes`.

    It stays initialised until the interpreter ends: "After finalization, a subsequent initialization call [...] leads
    to undefined behavior" (NVSHMEM documentation, execution model). Later callers may need a larger heap: it grows
    where it uses CUDA virtual memory, which is the default.
    Collective: every member of the rendezvous. Raises UsageError where the user has set too small a heap, or this
    process is initialised as another PE.
    """
    needed = max(rendezvous.exchange(heap_bytes).values())
    sized_by_user = None if _PROCESS.sized_here else os.environ.get(SIZE_VARIABLE)
    rendezvous.agree(attempt(lambda: check_heap_size(sized_by_user, needed)))
    pe = rendezvous.rank, len(rendezvous.members)
    rendezvous.agree(attempt(lambda: check_pe(_PROCESS.pe, pe)))
    if _PROCESS.pe is not None:
        return
    # NVSHMEM reads the size as early as it makes the unique id.
    _PROCESS.sized_here = size_heap(os.environ, needed)
    core = load()
    made: list[Any] = []
    rendezvous.agree(attempt(lambda: made.append(core.get_unique_id() if rendezvous.rank == 0 else None)))
    unique_id = rendezvous.exchange(made[0], [0])[0]
    rendezvous.agree(attempt(lambda: _initialise(core, unique_id, *pe)))
    _PROCESS.pe = pe
    atexit.register(_finalise)


def check_pe(before: tuple[int, int] | None, now: tuple[int, int]) -> None:
    """Raises UsageError where this process, PE `before[0]` of `before[1]` if any, is now to be another one."""
    if before is not None and before != now:
        raise UsageError(
            f"nvshmem numbers the ranks of a process once: it was rank {before[0]} of {before[1]} before and is rank "
            f"{now[0]} of {now[1]} now: use nccl for one of the two"
        )


def size_heap(environ: MutableMapping[str, str], needed_bytes: int) -> bool:
    """Set the size of the symmetric heap in `environ`, unless the user has. Returns whether it did."""
    if SIZE_VARIABLE in environ:
        return False
    environ[SIZE_VARIABLE] = str(needed_bytes + HEAP_SLACK_BYTES)
    return True


def check_heap_size(given: str | None, needed_bytes: int) -> None:
    """Raises UsageError where `given`, the value that the user has set, is too small or is no size."""
    if given is None:
        return
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)\s*", given, re.IGNORECASE)
    if found is None:
        raise UsageError(
            f"{SIZE_VARIABLE}={given!r} is no size: give bytes, or a number with k, m, g or t, or unset it"
        )
    size = float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " ")
    if size < needed_bytes:
        raise UsageError(
            f"{SIZE_VARIABLE}={given} holds {size / 2**20:.0f} MiB, this refit needs {needed_bytes / 2**20:.0f} MiB on "
            f"every rank: raise it to {-(-needed_bytes // 2**20)}m or unset it, or lower --staging-mib"
        )


def check_room(needed_bytes: int, rank: int, remedy: str) -> None:
    """Raises UsageError with both figures where this GPU has less than `needed_bytes` left for the symmetric heap."""
    # Freed symmetric memory returns to NVSHMEM, not to CUDA, and can be allocated again.
    if needed_bytes <= _PROCESS.pooled_bytes and _PROCESS.num_open == 0:
        return
    if torch.cuda.mem_get_info()[0] < needed_bytes:
        torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed_bytes:
        raise UsageError(
            f"nvshmem needs {needed_bytes / 2**30:.2f} GiB of symmetric memory, the same on every rank, and rank "
            f"{rank} has {free / 2**30:.2f} GiB left: {remedy}"
        )


def opened(symmetric_bytes: int) -> None:
    """A program has allocated `symmetric_bytes`."""
    _PROCESS.num_open += 1
    _PROCESS.pooled_bytes = max(_PROCESS.pooled_bytes, symmetric_bytes)


def closed() -> None:
    """A program has freed its symmetric memory."""
    _PROCESS.num_open -= 1


def abandon() -> None:
    """Record that streams wait for a lost or late peer, so that collective calls (freeing, finalising) would hang."""
    _PROCESS.broken = True


def is_abandoned() -> bool:
    return _PROCESS.broken


def attempt(action: Callable[[], Any]) -> RefitError | None:
    """Run `action`. Exceptions of NVSHMEM are returned as a RefitError that can be sent to the other ranks."""
    try:
        action()
    except RefitError as error:
        return error
    except Exception as error:
        return RefitError(
            f"NVSHMEM: {getattr(error, 'msg', None) or first_line(error)} (NVSHMEM_DEBUG=INFO tells more): "
            "or use --refit-method nccl"
        )
    return None


def _initialise(core: Any, unique_id: Any, rank: int, num_ranks: int) -> None:
    device = importlib.import_module("cuda.core").Device(torch.cuda.current_device())
    device.set_current()
    core.init(device=device, uid=unique_id, rank=rank, nranks=num_ranks, initializer_method="uid")


def _finalise() -> None:
    """Finalise NVSHMEM, collectively: only where all programs were closed, else other ranks may have exited."""
    if _PROCESS.num_open == 0 and not _PROCESS.broken:
        load().finalize()


def _alias_cuda_core() -> None:
    """Let nvshmem4py releases that import modules of cuda-core by their former, experimental names find them."""
    for name in ("_memory", "_stream"):
        with suppress(ImportError):
            former = f"cuda.core.experimental.{name}"
            if find_spec(former) is None:
                sys.modules[former] = importlib.import_module(f"cuda.core.{name}")


def _packaged_library() -> str:
    """The path of the library in the package nvidia-nvshmem; a placeholder where that is not installed."""
    with suppress(ImportError):
        spec = find_spec("nvidia.nvshmem")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            return str(Path(folder) / "lib" / "libnvshmem_host.so.3")
    return "<libnvshmem_host.so.3 of pip install nvidia-nvshmem-cu13>"
