"""Builds a transformers model of a ModelShape, splits it over TP and EP and shards it with `fully_shard`.

The model is built on the meta device. Each layer gets memory when it is sharded, so that no rank ever holds more than
one whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.models.fsdp2.experts import experts_of, split_over_experts
from refit.models.fsdp2.heads import NormOfParts, SinksOfParts
from refit.models.fsdp2.meshes import Meshes
from refit.models.huggingface.model import compute_rotary_buffers, materialise, meta_model
from refit.predict.families.names import Block, NamedModel
from refit.predict.families.tables import KEY_NORM, QUERY_NORM, SINKS
from refit.predict.megatron import Split


def build_model(shape: ModelShape, named: NamedModel, meshes: Meshes, side: SideSpec, device: torch.device) -> Any:
    """This rank's part of the model, in eval mode, its weights uninitialised. Collective: every rank of the side."""
    model = meta_model(shape, named, side)
    _split_over_tp(model, named, meshes, shape.tied_embeddings)
    split_over_experts(experts_of(model), meshes.ep)
    if shape.tied_embeddings:  # splitting them has made two parameters of one
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.model.layers:
        for experts in experts_of(layer):
            _shard(experts, meshes.expert_shards, device)
        _shard_other_dtypes(layer, side, meshes.dense_shards, device)
        _shard(layer, meshes.dense_shards, device)
    _shard_other_dtypes(model, side, meshes.dense_shards, device)
    _shard(model, meshes.dense_shards, device)
    compute_rotary_buffers(model, device)
    model.eval()
    return model


def _split_over_tp(model: torch.nn.Module, named: NamedModel, meshes: Meshes, tied: bool) -> None:
    if meshes.tp.size() == 1:
        return
    styles = {module: style for block in named.blocks for module, style in _styles(model, block)}
    if tied:  # the output layer has no row of its own
        styles["lm_head"] = _output_style()
    parallelize_module(model, meshes.tp, styles, src_data_rank=None)


def _styles(model: torch.nn.Module, block: Block) -> Iterator[tuple[str, ParallelStyle]]:
    """Module -> how torch splits it, for the tensors that the family's table splits over TP."""
    for tensor in block.tensors:
        if tensor.row.key == SINKS:
            yield f"{block.prefix}{tensor.name}".removesuffix(".sinks"), SinksOfParts()
        if tensor.row.routed or tensor.row.split is Split.REPLICATED or not tensor.name.endswith(".weight"):
            continue  # a bias is split with its weight
        name = f"{block.prefix}{tensor.name}".removesuffix(".weight")
        if tensor.row.in_transformers is not None:
            if tensor.row.in_transformers is Split.COLUMN:
                yield name, ColwiseParallel(output_layouts=Replicate())
        elif isinstance(model.get_submodule(name), torch.nn.Embedding):  # whose rows are its inputs
            yield name, RowwiseParallel(input_layouts=Replicate())
        elif tensor.row.key in (QUERY_NORM, KEY_NORM):
            yield name, NormOfParts()
        elif tensor.row.split is Split.ROW:
            yield name, RowwiseParallel()
        else:
            yield name, ColwiseParallel() if block.prefix else _output_style()


def _output_style() -> ParallelStyle:
    """Logits stay split over the vocabulary, as a DTensor, so that their loss can be computed in parts."""
    return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)


def _shard_other_dtypes(within: torch.nn.Module, side: SideSpec, mesh: Any, device: torch.device) -> None:
    """Shard each module with a parameter that the library keeps in another dtype than the side's, by itself.

    A router in float32 is one. FSDP2 gathers the parameters of a unit in one buffer, and in its first forward pass it
    refuses a unit of mixed dtypes.
    """
    assert side.dtype is not None, "flags that describe a model give its dtype"
    dtype = getattr(torch, side.dtype.value)
    for module in within.modules():
        own = module.parameters(recurse=False)
        if not isinstance(module, FSDPModule) and any(parameter.dtype != dtype for parameter in own):
            _shard(module, mesh, device)


def _shard(module: torch.nn.Module, mesh: Any, device: torch.device) -> None:
    """Give the module's parameters memory, and shard those that are not sharded yet. Gradients are summed in
    float32."""
    materialise(module, device)
    fully_shard(
        module, mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)
    )
