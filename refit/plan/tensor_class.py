"""Tensors that share a geometry: the same sharding on both sides, as the layers of a model do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from refit.plan.sharding import Sharding, TensorSharding, TensorSpec


@dataclass(frozen=True, slots=True)
class TensorClass:
    """Tensors with one geometry, planned as one tensor with an added dim 0 that counts them: `[num_tensors, ...]`.

    `tensors` are the destination's. They agree in all but their key. `source` and `destination` shard each of them.
    """

    tensors: tuple[TensorSpec, ...]
    source: TensorSharding
    destination: TensorSharding

    @property
    def dims(self) -> int:
        """Dims of a box of this class, dim 0 included."""
        return 1 + len(self.tensors[0].shape)

    @property
    def itemsize(self) -> int:
        return self.tensors[0].itemsize

    @property
    def padded(self) -> bool:
        return self.tensors[0].padded


def tensor_classes(source: Sharding, destination: Sharding) -> tuple[TensorClass, ...]:
    """The classes of the tensors of two sides, which hold the same ones, in the order of the destination's tensors."""
    equal: dict[TensorSharding, int] = {}
    numbers = {id(each): equal.setdefault(each, len(equal)) for each in (*source.distinct, *destination.distinct)}
    found: dict[tuple[object, ...], list[TensorSpec]] = defaultdict(list)
    for key, tensor in destination.tensors.items():
        shardings = (numbers[id(source.by_key[key])], numbers[id(destination.by_key[key])])
        found[shardings, tensor.shape, tensor.dtype, tensor.stacked, tensor.padded].append(tensor)
    return tuple(
        TensorClass(tuple(tensors), source.by_key[tensors[0].key], destination.by_key[tensors[0].key])
        for tensors in found.values()
    )
