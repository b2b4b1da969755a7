"""The live part of a delta: what a source keeps and compares, and what a destination applies, message by message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from refit.config.delta import Snapshot
from refit.encodings.base import Peers
from refit.encodings.delta.counts import Counts
from refit.encodings.delta.cpu import APPLY, FIND, PACK, CpuDecoder, CpuEncoder
from refit.encodings.delta.passing import packs, reached
from refit.encodings.delta.versions import MOVED, Versions
from refit.encodings.delta.wire import DeltaWire
from refit.encodings.packed import PackedWeights
from refit.errors import RefitError, UnavailableError
from refit.memory.codec import Decoder, Encoder, Piece
from refit.memory.weights import LocalWeights, generations, refresh_all
from refit.plan.plan import RefitPlan

if TYPE_CHECKING:
    from refit.encodings.delta.gpu import GpuDecoder, GpuEncoder

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
        self._rank = peers.rank
        part = plan.for_rank(peers.rank)
        targets = reached(plan, peers.rank) if packs(plan, peers.rank) else []
        self.versions = Versions(peers, targets, receives=bool(part.receives))
        self.counts = Counts()
        self._encoders: list[CpuEncoder | GpuEncoder] = []
        self._decoders: list[GpuDecoder] = []
        self._on_host = wire.options.snapshot is Snapshot.HOST
        self._held = (source, destination)
        self._generations = generations(*self._held)
        device = next((weights.device for weights in self._held if weights is not None), torch.device("cpu"))
        self._flag = torch.zeros(1, dtype=torch.int32, device=device) if device.type == "cuda" else None
        if self._flag is not None and find_spec("triton") is None:
            raise UnavailableError("--refit-encoding delta on GPUs needs Triton: pip install triton")
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
            self._decoders.clear()
            self.forget(MOVED)
        self.counts.begin()
        self.versions.begin()

    def finish(self) -> None:
        """Raises RefitError where a message was not what had been agreed, so that nothing of it was applied."""
        if self._flag is not None and int(self._flag):
            self._flag.zero_()
            raise RefitError(
                f"a message to rank {self._rank} does not lead from version {self.versions.expected} to "
                f"{self.versions.version}, or is damaged: the next refit will be a full one"
            )
        self.versions.finish()

    def counted(self) -> Mapping[str, int]:
        if self._flag is not None:
            from refit.encodings.delta.gpu import GpuEncoder, add_counts

            encoders = [encoder for encoder in self._encoders if isinstance(encoder, GpuEncoder)]
            add_counts(encoders, self.counts, is_full=self.versions.is_full)
        return {**self.counts.as_mapping(), "snapshot_bytes": self.staging_bytes}

    def beside_s(self, finish_s: float) -> Mapping[str, float]:
        """A GPU finds, packs and applies beside the transfer."""
        if self._flag is None:
            return {}
        packed = sum(encoder.timer.seconds() for encoder in self._encoders if not isinstance(encoder, CpuEncoder))
        applied = sum(decoder.timer.seconds() for decoder in self._decoders)
        return {phase: seconds for phase, seconds in ((PACK, packed), (APPLY, applied)) if seconds > 0.0}

    def forget(self, reason: str) -> None:
        for held in (self.versions.snapshot, self.versions.weights):
            held.forget(reason)

    def close(self) -> None:
        self.source = self.destination = None
        self._held = (None, None)
        self._encoders.clear()
        self._decoders.clear()

    def _encoder(self, weights: LocalWeights, pieces: Sequence[Piece]) -> Encoder:
        encoder: CpuEncoder | GpuEncoder
        if self._flag is None:
            encoder = CpuEncoder(weights, pieces, self.versions, self.counts)
        else:
            from refit.encodings.delta.gpu import GpuEncoder

            encoder = GpuEncoder(weights, pieces, self.versions, on_host=self._on_host)
        self._encoders.append(encoder)
        return encoder

    def _decoder(self, weights: LocalWeights, pieces: Sequence[Piece]) -> Decoder:
        if self._flag is None:
            return CpuDecoder(weights, pieces, self.versions)
        from refit.encodings.delta.gpu import GpuDecoder

        decoder = GpuDecoder(weights, pieces, self.versions, self._flag)
        self._decoders.append(decoder)
        return decoder
