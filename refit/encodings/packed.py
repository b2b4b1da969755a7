"""PackedWeights: a side whose messages an encoding packs, whatever makes or uses its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from refit.memory.codec import Decoder, Encoder, Piece
from refit.memory.weights import Hook, LocalShard, LocalWeights, Part
from refit.plan.box import Box

EncoderOf = Callable[[LocalWeights, Sequence[Piece]], Encoder]
DecoderOf = Callable[[LocalWeights, Sequence[Piece]], Decoder]


class PackedWeights(LocalWeights):
    """The weights of `inner`, in the same memory and with its hooks; messages by the encoders and decoders given."""

    def __init__(self, inner: LocalWeights, encoder_of: EncoderOf, decoder_of: DecoderOf) -> None:
        self._inner = inner
        self._encoder_of = encoder_of
        self._decoder_of = decoder_of
        self.is_pipelined = inner.is_pipelined

    def __iter__(self) -> Iterator[LocalShard]:
        return iter(self._inner)

    @property
    def generation(self) -> int:
        return self._inner.generation

    def parts(self, key: str, box: Box) -> list[LocalShard]:
        return self._inner.parts(key, box)

    def refresh(self) -> bool:
        return self._inner.refresh()

    def before_reading(self, parts: Iterable[Part]) -> Hook | None:
        return self._inner.before_reading(parts)

    def after_writing(self, parts: Iterable[Part]) -> Hook | None:
        return self._inner.after_writing(parts)

    def encoder(self, pieces: Sequence[Piece]) -> Encoder:
        return self._encoder_of(self._inner, pieces)

    def decoder(self, pieces: Sequence[Piece]) -> Decoder:
        return self._decoder_of(self._inner, pieces)
