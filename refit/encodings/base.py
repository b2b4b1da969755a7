"""LiveEncoding: the protocol of an encoding that is bound to this rank's weights.

The pure part of an encoding, what crosses the wire, is a `refit.plan.wire.Wire`; the oracle's part is in
`refit.encodings.oracle`. A row of ENCODINGS names all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from refit.memory.weights import LocalWeights


class LiveEncoding(Protocol):
    """Both sides on this rank as the wire sees them. Made by `bind` of a row of ENCODINGS, which is collective.

    A transport moves `source` to `destination`, each None where this rank is not in that side. Their hooks make and use
    the weights: `before_reading` and `after_writing` beside a message of fixed length, `encoder` and `decoder` in place
    of its copies where the wire has `max_bytes`.

    `phases` are the names of the encoding's own phases in a report, the last one with the time of `finish`.
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
        """A run begins. The current stream may still be writing the source's weights."""
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

    def close(self) -> None:
        """Drop all references to weights."""
        ...
