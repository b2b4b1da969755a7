"""A family of models in one row: its tensors have names, its config.json is read and written, nothing else knows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.config.registry import FAMILIES
from refit.config.rows import ModelFamily
from refit.config.shape import Dtype, ModelShape
from refit.errors import UsageError
from refit.predict.families.config_json import config_values
from refit.predict.families.config_keys import GROUPED_QUERIES, SIZES
from refit.predict.families.names import named_model
from refit.predict.families.tables import DENSE_MLP, GROUPED_QUERY_ATTENTION, MODEL, NORMS, Family

PLAIN = Family(
    "plain",
    fits=lambda shape: shape.mla is None and shape.experts is None and not shape.qk_layernorm,
    model=MODEL,
    layer=(*NORMS, *(row for row in GROUPED_QUERY_ATTENTION if not row.name.endswith("norm.weight"))),
    dense=DENSE_MLP,
    keys=(*SIZES, *GROUPED_QUERIES),
    style={"group-query-attention": True},
)
"""Dense models without norms of queries and keys, as llama's are."""

CONFIG = {
    "model_type": "plain",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with FAMILIES.added("plain", ModelFamily(f"{__name__}:PLAIN")):
        yield


def shape_of(folder: Path, **changes: object) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    flags = ["--hf-config", str(folder), "--refit-method", "gloo", "--source-format", "fsdp2"]
    model = parse(flags).scenario.model
    assert model is not None
    return model


def test_a_config_json_is_read_and_written(tmp_path: Path) -> None:
    shape = shape_of(tmp_path)
    assert (shape.num_layers, shape.num_query_groups, shape.qk_layernorm) == (2, 2, False)
    assert CONFIG.items() <= config_values(shape).items()
    with pytest.raises(UsageError, match="no plain is known to have 'sparse_layers' 2"):
        shape_of(tmp_path, sparse_layers=2)


def test_its_tensors_have_names(tmp_path: Path) -> None:
    named = named_model(shape_of(tmp_path), Dtype.BF16)
    assert named.family is PLAIN
    names = [tensor.name for block in named.blocks for tensor in block.tensors]
    assert not [name for name in names if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(named.logical) == 3 + 2 * 6  # embeddings, norm, output; QKV, projection, two norms, two of the MLP


def test_the_others_are_as_they_were(tmp_path: Path) -> None:
    flags = ["--model", "tiny_qwen3", "--refit-method", "gloo", "--source-format", "fsdp2"]
    model = parse(flags).scenario.model
    assert model is not None
    assert named_model(model, Dtype.BF16).family.model_type == "qwen3"
    shape_of(tmp_path)
    with pytest.raises(UsageError, match=r"llama, qwen2, .*, deepseek_v2, plain: for plain .*leave --add-qkv-bias out"):
        parse([*flags[2:], "--hf-config", str(tmp_path), "--add-qkv-bias"])
