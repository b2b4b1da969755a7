"""Every family with a small preset: what transformers saves is read, verified and written again as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from refit.checkpoints import write
from refit.checkpoints.layout import config_of, plan_folder
from refit.checkpoints.load import load
from refit.config import yaml_files
from refit.config.shape import Dtype
from refit.predict.families.config_json import config_values
from tests.checkpoints.made import checkpoint, contents, in_one_file, shape_of, tensors_of
from tests.checkpoints.test_load import check, empty, sharding, whole

PRESETS = [name for name in yaml_files.names("models") if name.startswith("tiny_")]


@pytest.mark.parametrize("name", PRESETS)
def test_a_family_is_read_and_written_as_transformers_has_it(tmp_path: Path, name: str) -> None:
    flags = (f"--model={name}", "--vocab-size=96")
    checkpoint(tmp_path / "in", flags, shard="1GB")
    found, side, shape = contents(tmp_path / "in", flags), sharding(flags, 2, ep=2), shape_of(flags)
    planned, places = plan_folder(tmp_path / "out", shape, Dtype.BF16, side.tensors)
    write.create(planned, config_of(config_values(shape), Dtype.BF16), [])
    ranks = [empty(side, rank) for rank in range(2)]
    for weights in ranks:
        load(weights, found)
        write.write(planned, places, weights)
    write.finish(planned)
    check(side, ranks, found)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.to(ours[key].dtype)), key


def test_mxfp4_experts_become_what_transformers_makes_of_them(tmp_path: Path) -> None:
    flags = ("--model=tiny_gpt_oss", "--vocab-size=96")
    checkpoint(tmp_path / "in", flags, shard="1GB")
    tensors, generator = tensors_of(tmp_path / "in"), torch.Generator().manual_seed(0)
    expected = {}
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = tensors.pop(key).shape
        size = (experts, rows, inputs // 32)
        blocks = torch.randint(256, (*size, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 130, size, generator=generator, dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        expected[key] = convert_moe_packed_tensors(blocks, scales)
    found, side = contents(in_one_file(tmp_path / "mxfp4", tensors), flags), sharding(flags, 2, ep=2)
    assert any("MXFP4" in note for note in found.notes)
    ranks = [empty(side, rank) for rank in range(2)]
    for weights in ranks:
        load(weights, found)
    check(side, ranks, found)
    prefix = "decoder.layers.0.mlp.experts.experts.linear_"
    gate_up = expected["model.layers.0.mlp.experts.gate_up_proj"].float().transpose(1, 2)
    fc1, fc2 = (whole(side, ranks, f"{prefix}{name}.weight") for name in ("fc1", "fc2"))
    assert torch.equal(fc1, torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], 1))
    assert torch.equal(fc2, expected["model.layers.0.mlp.experts.down_proj"].float().transpose(1, 2))
