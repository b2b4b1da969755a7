"""Reads a live model's sharding from Megatron's `sharded_state_dict()`, the source of distributed checkpoints."""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from refit.errors import ShardingError
from refit.memory.views import span_bytes
from refit.memory.weights import LocalShard, LocalWeights, joined
from refit.models.megatron import compat
from refit.models.megatron.build import BuiltModel
from refit.plan.box import Box
from refit.plan.sharding import ITEMSIZE, TensorSpec

ALIASES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.in_proj.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
)
"""Norms that some layer specs fuse into the next linear: spelling and canonical spelling."""

SECTIONS = re.compile(r"\.(in_proj|conv1d)\.weight\.(\w+)$")
"""The sections of a delta net's tensors, `in_proj.weight.query`; here `query.in_proj.weight`, as other parts are."""


def canonical_key(key: str) -> str:
    """The canonical spelling of a key that layer specs spell differently: `...input_layernorm.weight`."""
    for spelling, canonical in ALIASES:
        if spelling in key:
            return key.replace(spelling, canonical)
    return SECTIONS.sub(r".\2.\1.weight", key)


def read_weights(model: BuiltModel) -> LocalWeights:
    """Every tensor of the model's `sharded_state_dict()`, as views onto the model's own storage.

    Raises ShardingError where an entry is not a view of a parameter or persistent buffer, where one of those is
    missing or only partly covered, and where a dtype is not supported.
    """
    owners = Owners(model.chunks)
    shards: dict[tuple[str, Box, int], LocalShard] = {}
    for stated in stated_tensors(model):
        tensor = TensorSpec(
            canonical_key(stated.key),
            tuple(int(size) for size in stated.global_shape),
            _dtype_name(stated),
            stacked=stated.prepend_axis_num > 0,
            padded=bool(stated.allow_shape_mismatch),
        )
        box = Box(
            tuple(int(offset) for offset in stated.global_offset),
            (1,) * stated.prepend_axis_num + tuple(int(size) for size in stated.local_shape),
        )
        view = stated.data.detach().view(box.extents)
        # Chunks that share their word embedding state it once each.
        shards[tensor.key, box, view.data_ptr()] = LocalShard(tensor, box, owners.of(stated.key, view), view)
    memory = LocalWeights(joined(shards.values()))
    check_complete(model.chunks, memory)
    return memory


def stated_tensors(model: BuiltModel) -> Iterator[ShardedTensor]:
    """All ShardedTensors of all chunks. Factories (gated fc1) are expanded; objects without weights are left out."""
    # Without the second entry, a model with identical layers states them stacked under one key.
    metadata = {"dp_cp_group": model.groups.dp_cp, "non_homogeneous_layers": True}
    with compat.running_on(model.groups, model.device, len(model.chunks)):
        for chunk in model.chunks:
            yield from _flatten(chunk.sharded_state_dict(metadata=metadata))  # type: ignore[operator]


def _flatten(stated: Any) -> Iterator[ShardedTensor]:
    if isinstance(stated, ShardedTensor):
        yield stated
    elif isinstance(stated, ShardedTensorFactory):
        yield from _flatten(stated.build())
    elif isinstance(stated, Mapping):
        for value in stated.values():
            yield from _flatten(value)
    elif isinstance(stated, (list, tuple)):
        for value in stated:
            yield from _flatten(value)


def _dtype_name(stated: ShardedTensor) -> str:
    name = str(stated.data.dtype).removeprefix("torch.")
    if name not in ITEMSIZE:
        raise ShardingError(f"{stated.key} has dtype {name}, which is not supported: use one of {', '.join(ITEMSIZE)}")
    return name


@dataclass(frozen=True, slots=True)
class Owner:
    """A parameter or persistent buffer and its first name in the model. Tied weights are one owner."""

    name: str
    tensor: torch.Tensor

    @property
    def begin(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        """The address just past the last element."""
        return self.begin + span_bytes(self.tensor)


class Owners:
    """The parameters and persistent buffers of a model's chunks, found by address."""

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        self.all = sorted(_owners(chunks), key=lambda owner: owner.begin)
        self._begins = [owner.begin for owner in self.all]

    def of(self, key: str, view: torch.Tensor) -> torch.Tensor:
        """The tensor that contains `view`'s memory. Raises ShardingError where no tensor of the model does."""
        index = bisect.bisect_right(self._begins, view.data_ptr()) - 1
        if index < 0 or view.data_ptr() >= self.all[index].end:
            raise ShardingError(
                f"{key}: its sharded_state_dict() entry is a copy, not a view of a parameter or persistent buffer: "
                "a refit could not write through it"
            )
        return self.all[index].tensor


def _owners(chunks: Iterable[torch.nn.Module]) -> Iterator[Owner]:
    seen: set[tuple[int, int]] = set()
    for number, chunk in enumerate(chunks):
        prefix = f"chunk {number}: " if number else ""
        for name, tensor in [*chunk.named_parameters(), *persistent_buffers(chunk)]:
            memory = (tensor.data_ptr(), tensor.numel())
            if tensor.numel() and memory not in seen:
                seen.add(memory)
                yield Owner(prefix + name, tensor)


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the state dict, with their full names; caches and counters do not."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def check_complete(chunks: Iterable[torch.nn.Module], memory: LocalWeights) -> None:
    """Raise ShardingError unless `memory` covers each element of all parameters and persistent buffers once."""
    views: dict[int, list[torch.Tensor]] = defaultdict(list)
    for shard in memory:
        views[id(shard.owner)].append(shard.view)
    problems = [
        f"{owner.name} {list(owner.tensor.shape)} {problem}"
        for owner in Owners(chunks).all
        if (problem := _coverage_problem(owner, views[id(owner.tensor)])) is not None
    ]
    if problems:
        raise ShardingError(
            f"{len(problems)} parameters or persistent buffers are not stated by sharded_state_dict() as they should "
            "be: " + "; ".join(problems[:5])
        )


def _coverage_problem(owner: Owner, views: list[torch.Tensor]) -> str | None:
    """Why these views are no partition of `owner`; None where each element is in exactly one of them."""
    stated, held = sum(view.numel() for view in views), owner.tensor.numel()
    if not views:
        return "is missing"
    if stated != held:
        return f"has {held} elements, {stated} are stated"
    if len(views) == 1 and views[0].is_contiguous() and owner.tensor.is_contiguous():
        return None if views[0].data_ptr() == owner.begin else "is stated beyond its end"
    return (
        None
        if _touched(owner, views)
        else f"is stated {stated} elements long, but some of them twice, others not at all"
    )


def _touched(owner: Owner, views: list[torch.Tensor]) -> bool:
    """Whether every element of `owner` lies in some view: mark them in bytes laid out like the owner's memory."""
    itemsize = owner.tensor.element_size()
    marks = torch.zeros((owner.end - owner.begin) // itemsize, dtype=torch.uint8, device=owner.tensor.device)
    for view in views:
        offset = (view.data_ptr() - owner.begin) // itemsize
        marks.as_strided(view.shape, view.stride(), offset).fill_(1)
    return bool(marks.as_strided(owner.tensor.shape, owner.tensor.stride(), 0).all())
