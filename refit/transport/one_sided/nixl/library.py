"""NIXL in this process: the library, one agent, and what UCX says of the transports that it has taken.

All programs of a process share its agent, since making one takes half a second. The agent has no thread of its own:
whoever waits asks it, which is what makes progress. Messages to this process name the inbox that they are for.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from refit.errors import RefitError, UnavailableError, first_line
from refit.transport.one_sided.nixl.options import DEFAULT_BACKEND
from refit.transport.one_sided.nixl.ucx_log import UcxLog

INSTALL = "pip install 'refit-benchmark[nixl]'"
MODULES = ("nixl_cu13", "nixl_cu12")
"""The library for CUDA 13 and 12. Either runs without CUDA."""


NOTE = struct.Struct("<IIBQQ")
"""A notification: the inbox at the receiver, the sender's rank, a counter and its value, and how often the sender's
weights have moved."""

Inbox = Callable[[int, int, int, int], None]
"""Takes a notification: the sender's rank, a counter, its value, and the number of moves."""


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory, from byte `address` on. `device` is the number that NIXL's descriptors have for it."""

    address: int
    nbytes: int
    device: int
    is_vram: bool

    @property
    def kind(self) -> str:
        return "VRAM" if self.is_vram else "DRAM"


@dataclass(frozen=True, slots=True)
class Registration:
    """Regions that were registered together, and NIXL's own list of them."""

    regions: tuple[Region, ...]
    handle: Any


def check_available(backend: str) -> None:
    """Raise UnavailableError where the library or `backend` is missing, or `backend` does not reach memory of peers."""
    agent(backend)


_AGENTS: dict[tuple[int, str], Agent] = {}


def agent(backend: str) -> Agent:
    """This process's agent with `backend`, made on first use. Raises UnavailableError as `check_available` says.

    Also in a process that was forked from one with an agent: UCX would hang there.
    """
    key = os.getpid(), backend
    if any(process != os.getpid() for process, _ in _AGENTS):
        raise UnavailableError(
            "NIXL was in use before this process was forked, and cannot be used in both: start it anew"
        )
    if key not in _AGENTS:
        _AGENTS[key] = Agent(backend)
    return _AGENTS[key]


class Agent:
    """An agent of NIXL with one backend. It is used by one thread."""

    def __init__(self, backend: str) -> None:
        """Raises UnavailableError where the library or `backend` is missing."""
        self.backend = backend
        self.name = f"refit-{uuid.uuid4().hex[:12]}"
        self._log = UcxLog() if backend == DEFAULT_BACKEND else None
        with contextlib.nullcontext() if self._log is None else self._log.asked_for():
            library = _library()
            self.errors = _errors_of(library)
            config = library.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent = library.nixl_agent(self.name, config)
            self._create_backend()
        self._inboxes: dict[int, Inbox] = {}
        self._num_inboxes = 0
        self._num_registered = 0
        self.ways: dict[str, str | None] = {}

    def _create_backend(self) -> None:
        known = sorted(self._agent.get_plugin_list())
        if self.backend not in known:
            raise UnavailableError(
                f"NIXL has no backend {self.backend} here: use --nixl-backend {DEFAULT_BACKEND}, or another one of "
                f"{', '.join(known)}"
            )
        try:
            with _quiet():
                self._agent.create_backend(self.backend)
        except self.errors as error:
            raise UnavailableError(
                f"NIXL cannot start its backend {self.backend} ({_said(error)}), as where a library that it needs is "
                f"missing: use --nixl-backend {DEFAULT_BACKEND}"
            ) from error
        kinds = set(self._agent.get_backend_mem_types(self.backend))
        if "DRAM_SEG" not in kinds or kinds & {"FILE_SEG", "BLK_SEG", "OBJ_SEG"}:
            raise UnavailableError(
                f"NIXL's backend {self.backend} moves memory to files, not to other ranks: "
                f"use --nixl-backend {DEFAULT_BACKEND}"
            )

    def open_inbox(self, inbox: Inbox) -> int:
        """The number of a new inbox, which gets what others send to it."""
        self._num_inboxes += 1
        self._inboxes[self._num_inboxes] = inbox
        return self._num_inboxes

    def close_inbox(self, number: int) -> None:
        self._inboxes.pop(number, None)

    def register(self, memories: Sequence[torch.Tensor]) -> Registration:
        """Register memory, uint8 each, on one device. Raises RefitError where NIXL cannot.

        Each registration in CPU memory has a device number of its own, where NIXL takes any: so what a peer knows of
        memory that was freed never stands for memory that lies there now.
        """
        self._num_registered += 1
        regions = tuple(
            Region(memory.data_ptr(), memory.numel(), _device(memory, self._num_registered), memory.is_cuda)
            for memory in memories
            if memory.numel()
        )
        if not regions:
            return Registration((), None)
        places = [(region.address, region.nbytes, region.device, "") for region in regions]
        try:
            with _quiet():
                handle = self._agent.register_memory(places, regions[0].kind, [self.backend])
        except self.errors as error:
            size = sum(region.nbytes for region in regions)
            raise RefitError(
                f"NIXL's {self.backend} cannot register {size / 2**20:.1f} MiB of {regions[0].kind} ({_said(error)}): "
                "raise the limit of locked memory (ulimit -l), or use another --refit-method"
            ) from error
        return Registration(regions, handle)

    def deregister(self, registration: Registration) -> None:
        if registration.handle is not None:
            with contextlib.suppress(*self.errors):
                self._agent.deregister_memory(registration.handle, [self.backend])

    def metadata(self, registration: Registration) -> bytes:
        """How a peer reaches this agent, and the registered memory."""
        if registration.handle is None:
            return bytes(self._agent.get_agent_metadata())
        return bytes(self._agent.get_partial_agent_metadata(registration.handle, True, [self.backend]))

    def meet(self, metadata: bytes) -> str:
        """Take in a peer's `metadata`. Returns the name of its agent. Raises RefitError where it cannot be reached."""
        try:
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            self._agent.make_connection(name, [self.backend])
        except self.errors as error:
            raise RefitError(f"NIXL cannot connect to a rank: {_said(error)}") from error
        return name

    def listed(self, name: str | None, rows: Any, kind: str) -> Any:
        """A prepared list of `rows`, uint64 `[number, 3]` of address, bytes and device: of `name`, or of this agent."""
        return self._agent.prep_xfer_dlist(name or "NIXL_INIT_AGENT", rows, kind, [self.backend])

    def write(self, own: Any, theirs: Any, numbers: Any) -> Any:
        """A write, to be started as often as wanted, of the entries `numbers` of two prepared lists."""
        return self._agent.make_prepped_xfer("WRITE", own, numbers, theirs, numbers, b"", [self.backend])

    def start(self, write: Any, note: bytes) -> bool:
        """Start a write, with a notification behind it. Returns whether it has ended."""
        return _has_ended(self._agent.transfer(write, note))

    def has_ended(self, write: Any) -> bool:
        """Raises RefitError where the write has failed."""
        return _has_ended(self._agent.check_xfer_state(write))

    def notify(self, name: str, note: bytes) -> None:
        self._agent.send_notif(name, note)

    def poll(self) -> None:
        """Make progress, and hand what has come to the inboxes. What is for no open one, or no message, is dropped."""
        for notes in self._agent.get_new_notifs([self.backend]).values():
            for note in notes:
                if len(note) == NOTE.size:
                    inbox, *rest = NOTE.unpack(note)
                    if inbox in self._inboxes:
                        self._inboxes[inbox](*rest)

    def new_ways(self) -> str | None:
        """The transports of large writes that UCX has chosen since the last call; None where it has chosen none."""
        return None if self._log is None else self._log.new_ways()

    def said(self, error: Exception) -> str:
        """An error of NIXL in words, with what UCX wrote of it."""
        wrote = None if self._log is None else self._log.last_error()
        return f"{_said(error)}: {wrote}" if wrote else _said(error)


def _library() -> ModuleType:
    found = [name for name in MODULES if find_spec(name) is not None]
    if not found:
        raise UnavailableError(f"nixl is not installed: {INSTALL}")
    cuda = "nixl_cu12" if (torch.version.cuda or "").startswith("12") else "nixl_cu13"
    try:
        library = importlib.import_module(cuda if cuda in found else found[0])
    except (ImportError, OSError) as error:
        raise UnavailableError(f"nixl cannot be imported ({first_line(error)}): {INSTALL}") from error
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.ERROR)  # else each agent says that it was made
    return library


def _errors_of(library: ModuleType) -> tuple[type[Exception], ...]:
    """The classes of the library's errors, which have no base in common, and our own for writes that failed."""
    bindings = importlib.import_module(f"{library.__name__}._bindings")
    found = (getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
    return (RefitError, *found)


def _device(memory: torch.Tensor, number: int) -> int:
    return memory.get_device() if memory.is_cuda else number


def _has_ended(state: str) -> bool:
    if state == "ERR":
        raise RefitError("a write failed")
    return state == "DONE"


def _said(error: Exception) -> str:
    return first_line(error) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the library prints of errors: they are raised too, and reported by whoever catches them."""
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
