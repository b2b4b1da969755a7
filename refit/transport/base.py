"""The interface of transports: prepare a plan once, then run it for every refit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from refit.config.options import MethodOptions, options_as
from refit.config.registry import METHODS, load
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.plan.wire import MaxBytes
from refit.transport.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """Settings of one scenario for transports.

    `staging_bytes` bounds the memory that a rank uses for staging, beyond both models. `timeout_s` bounds every wait.
    `own` are the settings that this transport alone has, of the class that its row names; None for their defaults.
    `is_pipelined` is whether weights are pipelined on any rank (`LocalWeights.is_pipelined`): a transport that sends
    all of a pair's weights as one message then sends several, so that something can be done beside them.
    `device_type` is where the weights are. At most `ranks_per_gpu` ranks share a GPU.
    `max_bytes` is that of the wire (`refit.plan.wire`). Where it is given, the weights' encoders and decoders take the
    place of copies of messages, on all ranks. A message that must be decoded cannot be written in place: then all are
    staged, whatever `own` says.
    """

    staging_bytes: int = 512 << 20
    timeout_s: float = 300.0
    own: MethodOptions | None = None
    is_pipelined: bool = False
    max_bytes: MaxBytes | None = None
    device_type: str = "cpu"
    ranks_per_gpu: int = 1

    def own_as(self, kind: type[T]) -> T:
        """The transport's own settings, which are of `kind`; the defaults where none are given."""
        return options_as(self.own, kind)


DEFAULTS = TransportOptions()


@dataclass(slots=True)
class RunReport:
    """What one `Program.run` did on this rank: seconds by phase, and bytes.

    Phases are those of the main thread. They do not overlap, and add up to nearly all of the run. `beside_s` is the
    time of a GPU's work that was hidden beside the transfer. Where an encoding packs the messages, bytes on the wire
    include their headers, and `most_wire_bytes_sent` is what could have been sent; elsewhere that is what was sent.
    `counts` and `remark` are what encodings counted on this rank, and say of the run.
    """

    phases_s: dict[str, float] = field(default_factory=dict)
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    local_bytes: int = 0
    beside_s: dict[str, float] = field(default_factory=dict)
    most_wire_bytes_sent: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    remark: str | None = None


class Program(Protocol):
    """A plan bound to this rank's weights and a transport, ready to run."""

    @property
    def staging_bytes(self) -> int:
        """Bytes that this rank has allocated beyond the models."""
        ...

    def run(self) -> RunReport:
        """Transfer all weights. On return, all destination weights of this rank are usable.

        Collective: every rank of the plan. Raises RefitError where a peer fails or time runs out.
        """
        ...

    def close(self) -> None:
        """Release staging and mappings. Collective."""
        ...


class IdleProgram:
    """The program of a rank that is not in the plan."""

    staging_bytes = 0

    def run(self) -> RunReport:
        return RunReport()

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Connected:
    """What was connected, in `words` where there was a choice. `slow` says what is slower than it need be, and why."""

    words: str | None = None
    slow: str | None = None


class Transport(Protocol):
    """Prepares programs. Constructed without arguments; listed in `refit.config.registry.METHODS`."""

    name: str

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        """Raise UnavailableError that says what is missing and how to get it, or why ranks cannot share a GPU.

        Needs no process group.
        """
        ...

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected | None:
        """Set up what a process needs once for all programs: communicators, connections, libraries, kernels.

        Returns what was connected, None where there was no choice.

        Collective, over the same ranks as `prepare`, which does this itself where it has not been done.
        """
        ...

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """Bind `plan` to this rank's weights. `source` or `destination` is None where this rank is not in that side.

        A run calls what `source.before_reading` and `destination.after_writing` return for the parts that it copies,
        and what `destination.before_reading` returns for those that it passes on in a later stage.

        The plan's ranks are those of `ranks`. Collective: every rank of the plan; for "nvshmem" every one of `ranks`,
        because all of them allocate symmetric memory. Idle ranks may always call, with both sides None.
        """
        ...


def get_transport(name: str) -> Transport:
    """The transport of method `name`. Raises UsageError, listing the known methods, for an unknown one."""
    transport: Transport = load(METHODS[name].transport)()
    return transport
