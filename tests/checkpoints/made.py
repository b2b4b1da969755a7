"""Small checkpoints, made with transformers and with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from refit.checkpoints.contents import Contents, contents_of
from refit.checkpoints.files import read_folder
from refit.cli.parsing import parse
from refit.config.shape import Dtype, ModelShape
from refit.predict.families.config_json import config_values

QWEN3_MOE = (
    "--model=tiny_qwen3_moe",
    "--num-layers=1",
    "--vocab-size=96",
    "--hidden-size=64",
    "--num-attention-heads=4",
    "--num-query-groups=2",
    "--kv-channels=16",
    "--moe-ffn-hidden-size=48",
    "--num-experts=4",
)
DEEPSEEK_V3 = ("--model=tiny_deepseek_v3", "--num-layers=2", "--moe-layer-freq=[0,1]", "--vocab-size=96")


def shape_of(flags: tuple[str, ...]) -> ModelShape:
    shape = parse([*flags, "--dry-run"]).scenario.model
    assert shape is not None
    return shape


def checkpoint(folder: Path, flags: tuple[str, ...], dtype: torch.dtype = torch.bfloat16, shard: str = "50KB") -> Any:
    """A checkpoint of transformers with random weights, in several files. Returns the model."""
    values = config_values(shape_of(flags))
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype).eval()
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as the library reads it."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def contents(folder: Path, flags: tuple[str, ...], dtype: Dtype = Dtype.BF16) -> Contents:
    return contents_of(read_folder(folder), shape_of(flags), dtype)


def in_one_file(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """A folder of one file, and of `config` where there is one."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_block_fp8(folder: Path, out: Path, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The checkpoint with all projections as codes and scales of blocks. Returns codes x scales of each, in float32."""
    tensors, expected = tensors_of(folder), {}
    for name, tensor in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            continue
        codes, values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty(tensor.shape)
        scales = torch.empty([-(-size // step) for size, step in zip(tensor.shape, block, strict=True)])
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                place = tuple(slice(i * s, (i + 1) * s) for i, s in zip((row, column), block, strict=True))
                scales[row, column] = tensor[place].float().abs().max() / 448
                codes[place] = (tensor[place].float() / scales[row, column]).to(torch.float8_e4m3fn)
                values[place] = codes[place].float() * scales[row, column]
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        expected[name] = values
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    in_one_file(out, tensors, config)
    return expected
