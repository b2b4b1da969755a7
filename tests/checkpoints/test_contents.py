"""Which tensors a folder must have, and the one line for each way in which it has others."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refit.checkpoints.files import read_folder
from refit.cli.parsing import parse
from refit.errors import UsageError
from refit.plan.box import Box
from tests.checkpoints.made import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    as_block_fp8,
    checkpoint,
    contents,
    in_one_file,
    shape_of,
    tensors_of,
)

UP = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    checkpoint(folder, QWEN3_MOE)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_every_byte_of_a_saved_model_is_of_some_logical_tensor(saved: Path) -> None:
    found = contents(saved, QWEN3_MOE)
    assert found.nbytes == sum(tensor.numel() * 2 for tensor in tensors_of(saved).values())
    assert found.num_tensors == len(tensors_of(saved))
    assert len(found.folder.files) > 1
    assert found.notes == ()
    (piece,) = found.pieces_of("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", Box((2, 50, 3), (1, 10, 5)))
    assert (piece.weights.tensor.name, piece.held) == (UP, Box((2, 3), (10, 5)))


def test_experts_that_are_one_tensor_are_found_too(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved)
    prefix = "model.layers.0.mlp.experts"
    gate_up = [
        torch.cat([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for name in ("gate", "up")])
        for expert in range(4)
    ]
    down = [tensors.pop(f"{prefix}.{expert}.down_proj.weight") for expert in range(4)]
    fused = {f"{prefix}.gate_up_proj": torch.stack(gate_up), f"{prefix}.down_proj": torch.stack(down)}
    found = contents(in_one_file(tmp_path / "fused", tensors | fused), QWEN3_MOE)
    (piece,) = found.pieces_of("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", Box((2, 50, 3), (1, 10, 5)))
    assert (piece.weights.tensor.name, piece.held) == (f"{prefix}.gate_up_proj", Box((2, 50, 3), (1, 10, 5)))


def test_what_is_left_out_or_rounded_is_said(saved: Path, tmp_path: Path) -> None:
    tensors = tensors_of(saved)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.1.eh_proj.weight"] = torch.ones(4, 4)
    tensors[UP] = tensors[UP].float()
    folder = in_one_file(tmp_path / "more", tensors, config_of(saved) | {"num_nextn_predict_layers": 1})
    assert contents(folder, QWEN3_MOE).notes == (
        "not read: model.layers.0.self_attn.rotary_emb.inv_freq: they follow from config.json",
        "not read: model.layers.1.eh_proj.weight: layers of multi-token prediction are not built from a config.json",
        "1 tensors are float32 in the files, and have the source's dtypes in it",
    )


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(UP), f"lacks 1 of the 24 tensors of the model: {UP}"),
        (lambda tensors: tensors.update(odd=torch.ones(1)), "has 1 tensors that the model has not: odd"),
        (
            lambda tensors: tensors.update({UP: torch.ones(48, 32)}),
            rf"{UP} is \[48, 32\] in .*, \[48, 64\] in the model",
        ),
        (lambda tensors: tensors.update({UP: torch.ones(48, 64, dtype=torch.int8)}), rf"{UP} is int8 in .*read are"),
        (
            lambda tensors: tensors.update({UP: torch.ones(48, 64).to(torch.float8_e4m3fn)}),
            f"{UP} is float8_e4m3fn without {UP}_scale_inv",
        ),
    ],
)
def test_tensors_of_another_model_are_named(saved: Path, tmp_path: Path, change: Change, told: str) -> None:
    tensors = tensors_of(saved)
    change(tensors)
    with pytest.raises(UsageError, match=told) as caught:
        contents(in_one_file(tmp_path / "changed", tensors, config_of(saved)), QWEN3_MOE)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_model_is_told_with_the_first_tensor(saved: Path, tmp_path: Path) -> None:
    folder = in_one_file(tmp_path / "other", tensors_of(saved), config_of(saved) | {"vocab_size": 97})
    with pytest.raises(
        UsageError, match=r"embed_tokens.weight is \[96, 64\] .*, \[97, 64\] in the model: .*config.json"
    ):
        parse(["--source-weights", str(folder), "--refit-method=gloo"])


def test_block_fp8_needs_the_block_that_its_scales_were_made_with(saved: Path, tmp_path: Path) -> None:
    as_block_fp8(saved, tmp_path / "fp8", (32, 40))
    assert "tensors are block FP8" in contents(tmp_path / "fp8", QWEN3_MOE).notes[0]
    config = config_of(tmp_path / "fp8")
    config["quantization_config"]["weight_block_size"] = [16, 40]
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"weight_scale_inv is F32 .*weight_block_size in config.json is another's"):
        contents(tmp_path / "fp8", QWEN3_MOE)
    del config["quantization_config"]
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="has no quantization_config with a weight_block_size"):
        contents(tmp_path / "fp8", QWEN3_MOE)


# --- Files ------------------------------------------------------------------------------------------------------------


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def copied(saved: Path, out: Path) -> Path:
    out.mkdir()
    for path in saved.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def no_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 4) + b"{]  " + bytes(100))


def wrong_size(path: Path) -> None:
    text = json.dumps({"it": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, r"index.json names model-00001-of-\d+.safetensors, which is not there: it should have "),
        (cut_off, r"is cut off: .* ends at byte [\d,]+, the file at [\d,]+"),
        (cut_in_header, r"is cut off: its header ends at byte [\d,]+, the file at 100"),
        (no_header, "is no safetensors file"),
        (wrong_size, r"it \[3\] in F32 takes 12 bytes, its header gives it 8"),
        (lambda path: path.write_bytes(b"abc"), "is no safetensors file"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(
    saved: Path, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    folder = copied(saved, tmp_path / "damaged")
    damage(first_file(folder))
    with pytest.raises(UsageError, match=told) as caught:
        parse(["--source-weights", str(folder), "--refit-method=gloo"])
    assert "\n" not in str(caught.value)


def test_an_index_names_what_its_files_have(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "index")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["odd"] = first_file(folder).name
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"says that odd is in model-00001-of-.*, which has no such tensor"):
        read_folder(folder)
    index.write_text("{]")
    with pytest.raises(UsageError, match="is not valid JSON"):
        read_folder(folder)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there"):
        read_folder(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no \*.safetensors"):
        read_folder(tmp_path)


def test_names_of_families_with_other_names_on_disk_are_found(tmp_path: Path) -> None:
    flags = ("--model=tiny_mixtral", "--num-layers=1", "--vocab-size=64")
    checkpoint(tmp_path / "mixtral", flags)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors_of(tmp_path / "mixtral")
    assert contents(tmp_path / "mixtral", flags).num_tensors == len(tensors_of(tmp_path / "mixtral"))
    checkpoint(tmp_path / "deepseek", DEEPSEEK_V3)
    assert contents(tmp_path / "deepseek", DEEPSEEK_V3).num_tensors == len(tensors_of(tmp_path / "deepseek"))


def test_tied_embeddings_are_read_once(tmp_path: Path) -> None:
    flags = ("--model=tiny_qwen2", "--num-layers=1", "--vocab-size=64")
    model = checkpoint(tmp_path, flags)
    assert shape_of(flags).tied_embeddings == model.config.tie_word_embeddings
    assert contents(tmp_path, flags).num_tensors == len(tensors_of(tmp_path))
