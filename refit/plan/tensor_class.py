"""Tensors that share a geometry: the same shardings, as the layers of a model do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from refit.plan.sharding import Sharding, TensorSharding, TensorSpec


@dataclass(frozen=True, slots=True)
class TensorClass:
    """Tensors with one geometry, planned as one tensor with an added dim 0 that counts them: `[num_tensors, ...]`.

    `tensors` are the destination's. They agree in all but their key. `shardings` shard each of them: the source's
    first, the destination's last, and between them what is delivered after each stage but the last.
    """

    tensors: tuple[TensorSpec, ...]
    shardings: tuple[TensorSharding, ...]

    @property
    def source(self) -> TensorSharding:
        return self.shardings[0]

    @property
    def destination(self) -> TensorSharding:
        return self.shardings[-1]

    def of_stage(self, stage: int) -> TensorClass:
        """The class with the shardings between which `stage` moves weights."""
        return TensorClass(self.tensors, self.shardings[stage : stage + 2])

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


def tensor_classes(shardings: Sequence[Sharding]) -> tuple[TensorClass, ...]:
    """The classes of the tensors of `shardings`, which hold the same ones, in the order of the last one's tensors."""
    equal: dict[TensorSharding, int] = {}
    numbers = {id(each): equal.setdefault(each, len(equal)) for sharding in shardings for each in sharding.distinct}
    found: dict[tuple[object, ...], list[TensorSpec]] = defaultdict(list)
    for key, tensor in shardings[-1].tensors.items():
        kinds = tuple(numbers[id(sharding.by_key[key])] for sharding in shardings)
        found[kinds, tensor.shape, tensor.dtype, tensor.stacked, tensor.padded].append(tensor)
    return tuple(
        TensorClass(tuple(tensors), tuple(sharding.by_key[tensors[0].key] for sharding in shardings))
        for tensors in found.values()
    )
