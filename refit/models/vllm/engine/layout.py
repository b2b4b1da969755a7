"""The load format that an engine states, beside the one that is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refit.predict.vllm.names import followed_name
from refit.predict.vllm.parameters import RankBlock

ALIGNMENT = 64
"""Bytes: where each tensor of a region begins, as torch's own allocator has it on CPUs."""


@dataclass(frozen=True, slots=True)
class Held:
    """A parameter's shape and dtype."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What one worker holds: the engine's name of every parameter -> what it is, and where in the region it begins."""

    held: Mapping[str, Held]

    @classmethod
    def stated(cls, worker: Mapping[str, Any]) -> Layout:
        """Of the answer of `RefitWorker.refit_layout`."""
        return cls({name: Held(tuple(shape), dtype) for name, (shape, dtype) in worker["layout"].items()})

    @property
    def offsets(self) -> dict[str, int]:
        found, end = {}, 0
        for name, held in self.held.items():
            found[name] = end
            end += -(-_nbytes(held) // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def nbytes(self) -> int:
        return sum(-(-_nbytes(held) // ALIGNMENT) * ALIGNMENT for held in self.held.values())

    def differences(self, predicted: Sequence[RankBlock]) -> list[str]:
        """Every parameter that is other than predicted, or on one side only: `name: predicted != the engine's`."""
        stated = {followed_name(name): held for name, held in self.held.items()}
        expected = {
            f"{block.block.prefix}{one.name}": Held(one.engine_shape, one.dtype)
            for block in predicted
            for one in block.parameters
        }
        return [
            f"{name}: {expected.get(name, 'absent')} != {stated.get(name, 'absent')}"
            for name in sorted(stated.keys() | expected.keys())
            if stated.get(name) != expected.get(name)
        ]


def _nbytes(held: Held) -> int:
    count = 1
    for size in held.shape:
        count *= size
    return count * _ITEM_BYTES[held.dtype]


_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "uint8": 1}
