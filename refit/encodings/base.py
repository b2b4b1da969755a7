"""LiveEncoding: the protocol of an encoding that is bound to this rank's weights.

The pure part of an encoding, what crosses the wire, is a `refit.plan.wire.Wire`; the oracle's part is in
`refit.encodings.oracle`. A row of ENCODINGS names all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from refit.memory.weights import LocalWeights


class Peers(Protocol):
    """This rank, and what it and the other ranks of a plan tell one another beside the transfer."""

    rank: int

    def publish(self, key: str, value: Any) -> None:
        """Let the others read `value`, which is pickled, under this rank's `key`."""
        ...

    def fetch(self, rank: int, key: str) -> Any:
        """The value that `rank` publishes under `key`. Waits for it; raises RefitError, naming the rank, in the end."""
        ...

    def forget(self, key: str) -> None:
        """Nobody reads this rank's `key` again."""
        ...


class LiveEncoding(Protocol):
    """Both sides on this rank as the wire sees them. Made by `bind` of a row of ENCODINGS, which is collective.

    A transport moves `source` to `destination`, each None where this rank is not in that side. Their hooks make and use
    the weights: `before_reading` and `after_writing` beside a message of fixed length, `encoder` and `decoder` in place
    of its copies where the wire has `max_bytes`.

    `phases` are the names of the encoding's own phases in a report, the first one with the time of `begin`, the last
    one with that of `finish`.
    """

    source: LocalWeights | None
    destination: LocalWeights | None
    phases: tuple[str, ...]

    @property
    def staging_bytes(self) -> int:
        """Bytes that this rank has allocated for the encoding."""
        ...

    def prepared(self) -> None:
        """The transport has asked for the hooks of all that it copies. Called once, before the first run."""
        ...

    def begin(self) -> None:
        """A run begins. The current stream may still be writing the source's weights. Raises RefitError."""
        ...

    def finish(self) -> None:
        """All messages of a run have been moved: on return the destination's own weights are usable.

        Raises RefitError where they cannot be.
        """
        ...

    def beside_s(self, finish_s: float) -> Mapping[str, float]:
        """Seconds of a GPU's work in the run that has ended that were hidden beside the transfer, by phase.

        `finish_s` is the time that `finish` took.
        """
        ...

    def counted(self) -> Mapping[str, int]:
        """What this rank has counted in the run that has ended, by name; the same names on all ranks."""
        ...

    @property
    def remark(self) -> str | None:
        """What is to be said of the run that has ended; None for nothing."""
        ...

    def forget(self, reason: str) -> None:
        """The destination has got weights by another way: nothing may build on what was sent before."""
        ...

    def close(self) -> None:
        """Drop all references to weights."""
        ...
