"""The settings of transports that write into memory of the other end. No torch: flags are read without it."""

from __future__ import annotations

from dataclasses import dataclass

from refit.config.options import MethodOptions, method_setting
from refit.errors import UsageError
from refit.plan.wire import MaxBytes

RING, DIRECT = "ring", "direct"


@dataclass(frozen=True, slots=True)
class BufferOptions(MethodOptions):
    """`buffers` is what peers write into: RING, a bounded ring of buffers that the destination unpacks; DIRECT, the
    destination's weights, which are moved into memory that others reach for that."""

    buffers: str = method_setting(
        RING,
        "one-sided-buffers",
        "nvshmem-buffers",
        choices=(RING, DIRECT),
        help="what nvshmem and shm write into: a ring of bounded size, or the weights themselves; default: ring",
    )

    @property
    def words(self) -> tuple[str, ...]:
        return _words(self)

    def writes_in_place(self, max_bytes: MaxBytes | None) -> bool:
        """Whether peers write into the destination's weights. Raises UsageError for buffers that there are not."""
        if self.buffers not in (RING, DIRECT):
            raise UsageError(f"unknown buffers {self.buffers!r} for one-sided transports: choose {RING} or {DIRECT}")
        return self.buffers == DIRECT and max_bytes is None

    @property
    def moves_weights(self) -> str | None:
        return f"--one-sided-buffers {DIRECT}" if self.buffers == DIRECT else None


@dataclass(frozen=True, slots=True)
class ShmOptions(BufferOptions):
    """Shared memory of one host."""


@dataclass(frozen=True, slots=True)
class NvshmemOptions(BufferOptions):
    """`force_put` treats peers with mapped memory like peers on other nodes."""

    force_put: bool = method_setting(
        False, "nvshmem-force-put", is_switch=True, help="reach ranks on the same node as ranks on other nodes"
    )

    @property
    def words(self) -> tuple[str, ...]:
        return (*_words(self), *(("put forced",) if self.force_put else ()))


def _words(options: BufferOptions) -> tuple[str, ...]:
    return (options.buffers,) if options.buffers != RING else ()
