"""The live part of a delta: what a source keeps and compares, and what a destination applies, message by message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refit.encodings.base import Peers
from refit.encodings.delta.counts import Counts
from refit.encodings.delta.cpu import APPLY, FIND, PACK, CpuDecoder, CpuEncoder
from refit.encodings.delta.versions import MOVED, Versions
from refit.encodings.delta.wire import DeltaWire
from refit.encodings.packed import PackedWeights
from refit.memory.codec import Decoder, Encoder, Piece
from refit.memory.weights import LocalWeights, generations, refresh_all
from refit.plan.plan import RefitPlan

AGREE = "agree"


class LiveDelta:
    """The `LiveEncoding` of one rank."""

    phases = (AGREE, FIND, PACK, APPLY)

    def __init__(
        self,
        plan: RefitPlan,
        wire: DeltaWire,
        peers: Peers,
        source: LocalWeights | None,
        destination: LocalWeights | None,
    ) -> None:
        part = plan.for_rank(peers.rank)
        targets = sorted({transfer.destination for transfer in part.sends})
        self.versions = Versions(peers, targets, receives=bool(part.receives))
        self.counts = Counts()
        self._encoders: list[CpuEncoder] = []
        self._held = (source, destination)
        self._generations = generations(*self._held)
        self.source, self.destination = (
            None if weights is None else PackedWeights(weights, self._encoder, self._decoder) for weights in self._held
        )

    @property
    def staging_bytes(self) -> int:
        """The snapshots."""
        return sum(encoder.snapshot_bytes for encoder in self._encoders)

    @property
    def remark(self) -> str | None:
        """Why the run that has ended was a full refit, as far as this rank sent; None where it sent changes."""
        return self.versions.reason

    def prepared(self) -> None:
        """Nothing is left to do: encoders and decoders are made as the transport asks for them."""

    def begin(self) -> None:
        """Agree on what the run builds on. Raises RefitError as `Versions.begin`."""
        refresh_all(*self._held)
        if generations(*self._held) != self._generations:
            # The transport binds its messages again, to new encoders, without what the former ones had sent. What a
            # destination's new memory holds is its model's affair.
            self._generations = generations(*self._held)
            self._encoders.clear()
            for held in (self.versions.snapshot, self.versions.weights):
                held.forget(MOVED)
        self.counts.begin()
        self.versions.begin()

    def finish(self) -> None:
        self.versions.finish()

    def counted(self) -> Mapping[str, int]:
        return {**self.counts.as_mapping(), "snapshot_bytes": self.staging_bytes}

    def beside_s(self, finish_s: float) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        self.source = self.destination = None
        self._held = (None, None)
        self._encoders.clear()

    def _encoder(self, weights: LocalWeights, pieces: Sequence[Piece]) -> Encoder:
        encoder = CpuEncoder(weights, pieces, self.versions, self.counts)
        self._encoders.append(encoder)
        return encoder

    def _decoder(self, weights: LocalWeights, pieces: Sequence[Piece]) -> Decoder:
        return CpuDecoder(weights, pieces, self.versions)
