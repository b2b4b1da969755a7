"""The sharding of a side whose tensors have Hugging Face names, from the part of each that every rank holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.sharding import Sharding, TensorSharding
from refit.predict.families.config_json import config_values
from refit.predict.families.names import Block, NamedModel, NamedTensor, named_model

HeldBox = Callable[[NamedTensor, int], Box | None]
"""The part of a tensor that the side's rank number N holds; None for an empty one."""


def check_family(shape: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where transformers has no such model; `name` is the side's."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    try:
        config_values(shape)
        family = named_model(shape, side.dtype).family
        if family.eager_attention and side.attn_impl == "flash_attention_2":
            raise UsageError(f"a {family.model_type} runs with eager attention here: give --attn-impl eager")
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def sharding_of(model: NamedModel, ranks: range, held: HeldBox) -> Sharding:
    """What every rank holds, by canonical keys."""
    by_kind: dict[int, dict[str, TensorSharding]] = {}  # by identity: layers of a kind share their tensors
    by_key: dict[str, TensorSharding] = {}
    for block in model.blocks:
        if id(block.tensors) not in by_kind:
            by_kind[id(block.tensors)] = _shardings(block, ranks, held)
        by_key |= {block.key_prefix + key: sharding for key, sharding in by_kind[id(block.tensors)].items()}
    return Sharding(tuple(ranks), model.logical, by_key)


def _shardings(block: Block, ranks: range, held: HeldBox) -> dict[str, TensorSharding]:
    """Logical tensor, below the block's prefix -> its sharding."""
    boxes: dict[str, dict[int, list[Box]]] = defaultdict(lambda: {rank: [] for rank in ranks})
    for tensor in block.tensors:
        for local, rank in enumerate(ranks):
            for key, box in _logical_boxes(tensor, held(tensor, local)):
                boxes[key][rank].append(box)
    return {
        key: TensorSharding.of((rank, coalesce(parts)) for rank, parts in by_rank.items())
        for key, by_rank in boxes.items()
    }


def _logical_boxes(tensor: NamedTensor, held: Box | None) -> Iterator[tuple[str, Box]]:
    if held is not None:
        yield from ((logical.key, logical.box) for _, logical in tensor.pieces_of(held))
