"""Folders that are written in parts: what the library and transformers find in them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from refit.checkpoints import write
from refit.checkpoints.files import read_folder
from refit.checkpoints.layout import PlannedFolder, config_of, files_beside, partial_of, plan_folder
from refit.checkpoints.load import load
from refit.config.shape import Dtype
from refit.errors import RefitError
from refit.predict.families.config_json import config_values
from tests.checkpoints.made import QWEN3_MOE, checkpoint, contents, shape_of, tensors_of
from tests.checkpoints.test_load import empty, sharding


def written(saved: Path, out: Path, max_file_bytes: int = 60_000) -> PlannedFolder:
    """The weights of two ranks in place of the files of `saved`, each rank's in a call of its own."""
    shape, side = shape_of(QWEN3_MOE), sharding(QWEN3_MOE, 2)
    planned, places = plan_folder(out, shape, Dtype.BF16, side.tensors, max_file_bytes)
    write.create(planned, config_of(config_values(shape), Dtype.BF16), files_beside(saved))
    for rank in range(2):
        weights = empty(side, rank)
        load(weights, contents(saved, QWEN3_MOE))
        write.write(planned, places, weights)
    return planned


def test_transformers_loads_what_two_ranks_have_written_and_computes_the_same(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "saved", QWEN3_MOE)
    (tmp_path / "saved/tokenizer.json").write_text("{}")
    planned = written(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write.finish(planned)
    assert not planned.partial.exists()
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "saved")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
    assert len(set(index["weight_map"].values())) == len(planned.sizes) > 1
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    tokens = torch.arange(24)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_one_file_has_the_name_without_numbers_and_no_index(tmp_path: Path) -> None:
    checkpoint(tmp_path / "saved", QWEN3_MOE)
    planned = written(tmp_path / "saved", tmp_path / "out", 10**9)
    (path,) = planned.sizes
    assert (path.name, planned.index) == ("model.safetensors", None)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_folder(planned.partial).files == planned.sizes


def test_a_disk_without_space_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint(tmp_path / "saved", QWEN3_MOE)
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(RefitError, match=r"out cannot be written \([\d,]+ bytes\): No space left on device"):
        written(tmp_path / "saved", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_that_was_filled_meanwhile_is_not_touched(tmp_path: Path) -> None:
    checkpoint(tmp_path / "saved", QWEN3_MOE)
    planned = written(tmp_path / "saved", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(RefitError, match=r"out cannot be written .*not empty"):
        write.finish(planned)
    assert (tmp_path / "out/mine").read_text() == "mine"
    assert not partial_of(tmp_path / "out").exists()
