"""A row that is left out of a family's table is found when the table meets the model of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from refit.cli.parsing import parse
from refit.config.shape import Dtype, ModelShape
from refit.errors import ShardingError, UsageError
from refit.models.huggingface.model import meta_model
from refit.models.huggingface.weights import read_weights, whole
from refit.predict.families import names
from refit.predict.families.tables import Family
from tests.models.huggingface.sides import FAMILY, SMALL, alone

TABLES = ("model", "layer", "dense", "routed", "experts")


@pytest.mark.parametrize("family", FAMILY, ids=FAMILY.values())
def test_a_missing_row_is_found(family: Family) -> None:
    has_dense = family.layer_keys and not family.published
    small = ["--num-layers=2", *(["--moe-layer-freq=[0,1]"] if has_dense else []), *SMALL]
    shape = parse(["--dry-run", "--model", FAMILY[family], *small]).scenario.model
    assert shape is not None
    side = alone(Dtype.FP32)
    if family.published:  # whose experts are as wide as its MLPs
        assert shape.experts is not None
        shape = replace(shape, ffn_hidden_size=shape.experts.ffn_hidden_size)
    named = names.named_model(shape, Dtype.FP32)
    model = meta_model(shape, named, side)
    read_weights(model, named, lambda _, tensor: whole(tensor))  # the whole table has all
    used = {tensor.row.name for block in named.blocks for tensor in block.tensors}
    for table in TABLES:
        for row in getattr(family, table):
            if row.name not in used:  # such as the projection of queries in one step, beside that in two
                continue
            rest = tuple(other for other in getattr(family, table) if other is not row)
            changes: dict[str, Any] = {table: rest}
            with mock.patch.object(names, "closest_family", return_value=replace(family, **changes)):
                assert _is_found(shape, model), row.name


def _is_found(shape: ModelShape, model: Any) -> bool:
    try:
        read_weights(model, names.named_model(shape, Dtype.FP32), lambda _, tensor: whole(tensor))
    except (AssertionError, ShardingError, UsageError):
        return True
    return False
