"""What is wrong in a family's table is found: a row that is left out when the table meets the model of transformers,
two that are exchanged, or one that names other rows, by mbridge's conversion. And what is wrong in a tensor, by the
oracle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from refit.bench import oracle
from refit.checkpoints.contents import contents_of
from refit.checkpoints.files import read_folder
from refit.checkpoints.load import load
from refit.cli.parsing import parse
from refit.config.shape import Dtype, ModelShape
from refit.errors import ShardingError, UsageError
from refit.memory.weights import assembled
from refit.models.huggingface.model import materialise, meta_model
from refit.models.huggingface.weights import read_weights, whole
from refit.models.huggingface.whole import WholeModel
from refit.plan.box import Box
from refit.predict.families import names
from refit.predict.families.qwen3_moe import QWEN3_MOE
from refit.predict.families.qwen3_next import QWEN3_NEXT
from refit.predict.families.tables import Family, Part, Row, families
from tests.models.huggingface.converted import converted_by_mbridge
from tests.models.huggingface.sides import CPU, FAMILY, SMALL, alone

TABLES = ("model", "layer", "linear", "dense", "routed", "experts")


def small_model(family: Family, *, dense: bool = True) -> tuple[ModelShape, Any]:
    """A small model of the family, on the meta device, with a `dense` layer where it can have one."""
    has_dense = dense and family.layer_keys and not family.published
    small = ["--num-layers=2", *(["--moe-layer-freq=[0,1]"] if has_dense else []), *SMALL]
    shape = parse(["--dry-run", "--model", FAMILY[family], *small]).scenario.model
    assert shape is not None
    if shape.experts is not None and not has_dense and family.misfit(shape) is not None:  # one width for all
        shape = replace(shape, ffn_hidden_size=shape.experts.ffn_hidden_size)
    return shape, meta_model(shape, names.named_model(shape, Dtype.FP32), alone(Dtype.FP32))


def tables(family: Family, shape: ModelShape) -> Iterator[tuple[str, Row]]:
    """The rows that the model has, each with the table that it is in."""
    named = names.named_model(shape, Dtype.FP32)
    used = {tensor.row.name for block in named.blocks for tensor in block.tensors}
    for table in TABLES:
        yield from ((table, row) for row in getattr(family, table) if row.name in used)


def changed(family: Family, table: str, rows: dict[str, Row | None]) -> Family:
    """The family with other rows in place of those of these names, or without them."""
    found = (rows.get(row.name, row) for row in getattr(family, table))
    others: dict[str, Any] = {table: tuple(row for row in found if row is not None)}
    return replace(family, **others)


@pytest.mark.parametrize("family", FAMILY, ids=FAMILY.values())
def test_a_missing_row_is_found(family: Family) -> None:
    shape, model = small_model(family)
    assert not _is_found(shape, model)  # with the whole table
    for table, row in tables(family, shape):
        with mock.patch.object(names, "closest_family", return_value=changed(family, table, {row.name: None})):
            assert _is_found(shape, model), row.name


def _is_found(shape: ModelShape, model: Any) -> bool:
    try:
        read_weights(model, names.named_model(shape, Dtype.FP32), lambda _, tensor: whole(tensor))
    except (AssertionError, ShardingError, UsageError):
        return True
    return False


@pytest.mark.parametrize("family", FAMILY, ids=FAMILY.values())
def test_a_wrong_row_is_found(family: Family) -> None:
    """Each two rows exchanged, and each row with other rows of its logical tensor, against mbridge's conversion."""
    shape, model = small_model(
        family, dense=family not in (QWEN3_MOE, QWEN3_NEXT)
    )  # of which mbridge has no dense layers
    materialise(model, CPU)
    state, generator = model.state_dict(), torch.Generator().manual_seed(1)
    for tensor in state.values():
        tensor.normal_(generator=generator)
    expected = converted_by_mbridge(family, shape, state)
    assert differences(shape, model, expected) == []
    number = 0
    for table, rows in wrong_rows(list(tables(family, shape))):
        with mock.patch.object(names, "closest_family", return_value=changed(family, table, dict(rows))):
            assert _is_found(shape, model) or differences(shape, model, expected), rows
        number += 1
    assert number > 3


def wrong_rows(rows: list[tuple[str, Row]]) -> Iterator[tuple[str, dict[str, Row]]]:
    """A table, and by name rows to put in place of its own."""
    for (table, first), (other, second) in itertools.combinations(rows, 2):
        if table == other:
            names_of = {first.name: replace(second, name=first.name), second.name: replace(first, name=second.name)}
            yield table, names_of
    parts = {Part.KEY: Part.VALUE, Part.VALUE: Part.KEY, Part.GATE: Part.UP, Part.UP: Part.GATE}
    parts |= {Part.IN_TURN: Part.SECTIONS, Part.SECTIONS: Part.IN_TURN}
    for table, row in rows:
        if row.part in parts:
            beside = [each for _, each in rows if each.key == row.key and each.part in (row.part, parts[row.part])]
            yield table, {each.name: replace(each, part=parts[each.part]) for each in beside}
        for first, second in itertools.combinations(row.keys, 2):
            keys = [{first: second, second: first}.get(key, key) for key in row.keys]
            yield table, {row.name: replace(row, key=keys[0], others=tuple(keys[1:]))}
        if row.interleaved or row.transposed:
            yield table, {row.name: replace(row, interleaved=False, transposed=False)}


def differences(shape: ModelShape, model: Any, expected: dict[str, torch.Tensor]) -> list[str]:
    """The logical tensors that the model's memory is not, read by the table, as mbridge has converted them."""
    named = names.named_model(shape, Dtype.FP32)
    weights = read_weights(model, named, lambda _, tensor: whole(tensor))
    found = []
    for key, tensor in named.logical.items():
        data = assembled(weights, key, Box.whole(tensor.shape))
        singles = {key: data}
        if ".experts.experts." in key:
            prefix, _, last = key.rpartition("experts.experts")
            singles = {f"{prefix}experts.local_experts.{each}{last}": part for each, part in enumerate(data)}
        found += [name for name, part in singles.items() if not torch.equal(part, expected[name])]
    return found


@pytest.mark.parametrize("family", FAMILY, ids=FAMILY.values())
def test_rows_of_every_kind_of_tensor_that_are_deleted_or_exchanged_are_found(family: Family) -> None:
    """The oracle says how many elements are wrong, in each tensor of transformers by itself."""
    shape, model = small_model(family)
    materialise(model, CPU)
    named = names.named_model(shape, Dtype.FP32)
    weights = read_weights(model, named, lambda _, tensor: whole(tensor))
    oracle.fill(weights, 1)
    assert oracle.check(weights, named.logical, 1).num_wrong == 0
    state = model.state_dict()
    tensors = [(tensor.row.name, block.prefix + tensor.name) for block in named.blocks for tensor in block.tensors]
    for name in dict(tensors).values():
        if shape.tied_embeddings and name == "lm_head.weight":
            continue
        data, before = state[name], state[name].clone()
        rows = before[0].numel()
        data[0] = 0
        assert 0 < oracle.check(weights, named.logical, 1).num_wrong <= rows, name
        if len(data) > 1:
            data[:2] = before[[1, 0]]
            assert rows < oracle.check(weights, named.logical, 1).num_wrong <= 2 * rows or rows == 1, name
        data.copy_(before)
    assert oracle.check(weights, named.logical, 1).num_wrong == 0


def test_its_class_is_called_as_in_transformers() -> None:
    for family in families():
        if family.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # an older release has not all of them
            assert family.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]
    assert families()[0].model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.mark.parametrize("family", FAMILY, ids=FAMILY.values())
def test_a_checkpoint_is_what_transformers_saves(tmp_path: Path, family: Family) -> None:
    shape, _ = small_model(family)
    model = WholeModel(shape, Dtype.FP32, CPU)
    oracle.fill(model.weights, 1)
    model._model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = dict(model.checkpoint())
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name
    oracle.poison(model.weights)
    load(model.weights, contents_of(read_folder(tmp_path), shape, Dtype.FP32))
    assert oracle.check(model.weights, names.named_model(shape, Dtype.FP32).logical, 1).num_wrong == 0
