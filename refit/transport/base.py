"""What every transport offers: prepare a plan once, run it as often as there are new weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from refit.errors import UsageError
from refit.models.weights import LocalWeights
from refit.plan.plan import RefitPlan


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """Bounds and switches of one scenario that transports read.

    `staging_bytes` bounds the memory a rank spends on staging, beyond both models. `timeout_s` bounds every wait.
    `one_sided_buffers` says where one-sided transports write: "ring", a bounded ring of buffers at the destination that
    it unpacks; "direct", the destination's weights, which move into shared memory for that. `one_sided_force_put`
    treats peers whose memory is mapped like those on other nodes, where the transport tells them apart (nvshmem).
    """

    staging_bytes: int = 512 << 20
    timeout_s: float = 300.0
    one_sided_buffers: str = "ring"
    one_sided_force_put: bool = False


@dataclass(slots=True)
class RunReport:
    """What one `Program.run` did on this rank.

    Phase seconds are the main thread's, do not overlap and add up to nearly all of the run.
    """

    phases_s: dict[str, float] = field(default_factory=dict)
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    local_bytes: int = 0


class Program(Protocol):
    """A plan bound to memory and a substrate, ready to run."""

    @property
    def staging_bytes(self) -> int:
        """Bytes this rank allocated beyond the models."""
        ...

    def run(self) -> RunReport:
        """Move every byte. On return all of this rank's destination weights are usable.

        Collective: every participating rank must call. Raises RefitError where a peer fails or time runs out.
        """
        ...

    def close(self) -> None:
        """Release staging and mappings. Collective."""
        ...


class IdleProgram:
    """What a rank that takes no part in a plan runs."""

    staging_bytes = 0

    def run(self) -> RunReport:
        return RunReport()

    def close(self) -> None:
        pass


class Transport(Protocol):
    """Prepares programs on one substrate."""

    name: str

    def check_available(self) -> None:
        """Raise UnavailableError, saying what is missing and how to get it. Needs no process group."""
        ...

    def connect(self, plan: RefitPlan, options: TransportOptions) -> None:
        """Make ready what a process needs once, whatever it moves: communicators, connections, libraries, kernels.

        Collective, as `prepare`, which does it itself where it has not been done.
        """
        ...

    def prepare(
        self, plan: RefitPlan, source: LocalWeights | None, destination: LocalWeights | None, options: TransportOptions
    ) -> Program:
        """Bind `plan` to this rank's weights; a side this rank is not part of is None.

        Collective: every rank of the plan must call, on the default process group's numbering; for "nccl" and "nvshmem"
        every rank of the default process group, as they make a group of their own. Idle ranks may always call, with
        None twice.
        """
        ...


def get_transport(name: str) -> Transport:
    """Raises UsageError, listing what there is, for an unknown name."""
    if name not in _FACTORIES:
        raise UsageError(f"unknown transport {name!r}: choose one of {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[name]()


# Imported only when asked for: the executors import this module, and some need libraries that are not everywhere.
def _gloo() -> Transport:
    from refit.transport.two_sided.executor import TwoSidedTransport

    return TwoSidedTransport("gloo")


def _nccl() -> Transport:
    from refit.transport.two_sided.executor import TwoSidedTransport

    return TwoSidedTransport("nccl")


def _shm() -> Transport:
    from refit.transport.one_sided.shm import SharedMemoryTransport

    return SharedMemoryTransport()


def _nvshmem() -> Transport:
    from refit.transport.one_sided.nvshmem import NvshmemTransport

    return NvshmemTransport()


_FACTORIES: dict[str, Callable[[], Transport]] = {"gloo": _gloo, "nccl": _nccl, "shm": _shm, "nvshmem": _nvshmem}
