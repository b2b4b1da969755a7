"""The presets give the models they are named after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refit.cli.flags import full_parser
from refit.cli.model_flags import model_shape
from refit.cli.presets import load_preset
from refit.config import yaml_files
from refit.config.layout import Layout
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.sides import check_side, predict_side

ONE_RANK = SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1))


def shape_of(name: str) -> ModelShape:
    return model_shape(full_parser().parse_flags([], load_preset(name)))


def num_elements(shape: ModelShape) -> int:
    return predict_side(shape, ONE_RANK).num_parameters


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_buffers"),
    [
        ("kimi_k2", 1_026_408_209_408, 60 * 384),
        # The published sizes of the released weights, for DeepSeek-V3 less the copies of embedding and output layer in
        # its multi-token prediction layer; the router's bias, which those count as a parameter, is a buffer here.
        ("deepseek_v3", 684_489_830_400 - 2 * 129280 * 7168, 59 * 256),
        ("qwen3_235b_a22b", 235_093_634_560, 0),
        ("qwen3_30b_a3b", 30_532_122_624, 0),
        ("qwen3_32b", 32_762_123_264, 0),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, num_parameters: int, num_buffers: int) -> None:
    assert num_elements(shape_of(name)) == num_parameters + num_buffers


def test_tiny_is_small_and_exercises_what_a_refit_must_get_right() -> None:
    shape = shape_of("tiny")
    assert num_elements(shape) < 20_000_000
    assert load_preset("tiny").dtype is Dtype.BF16
    assert shape.num_query_groups < shape.num_attention_heads
    assert shape.experts is not None
    assert (shape.experts.num_experts, shape.experts.layers) == (8, (False, True, True, True))
    assert shape.experts.shared_ffn_hidden_size
    for size in (1, 2, 4, 8):
        check_side(shape, SideSpec(Layout(tp=size, ep=1, etp=size, pp=1, world_size=size)), "any side")
        check_side(shape, SideSpec(Layout(tp=1, ep=size, etp=1, pp=1, world_size=size)), "any side")


def test_all_presets_load() -> None:
    names = yaml_files.names("models")
    assert {"tiny", "kimi_k2", "deepseek_v3", "qwen3_235b_a22b", "qwen3_30b_a3b", "qwen3_32b"} <= set(names)
    for name in names:
        shape_of(name)


def test_presets_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shape_of("tiny") == shape_of(os.path.relpath(yaml_files.CONFIG_DIR / "models" / "tiny.yaml"))


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nswiglu: true\nadd-qkv-bias: false\n"
        "num-experts: 4\nmoe-layer-freq: [0, 1]\nseq-length: 128\nrecompute-modules: [core_attn, mlp]\n"
    )
    args = load_preset(str(path))
    assert (args.num_layers, args.swiglu, args.add_qkv_bias, args.moe_layer_freq) == (2, True, False, (False, True))
    assert vars(args)["recompute-modules"] == ["core_attn", "mlp"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num-layers: 2\nhiden-size: 64\n", "unknown flag --hiden-size: did you mean --hidden-size?"),
        ("num-layers: two\n", "--num-layers: expected a whole number, got 'two'"),
        ("num-layers: 0\n", "--num-layers: must be at least 1, got 0"),
        ("num-layers:\n", "num-layers needs a value"),
        ("num-layers: {a: 1}\n", "num-layers needs a value"),
        ("refit-method: nccl\n", "unknown flag --refit-method"),
        ("swigl: false\n", "unknown flag --swigl: did you mean --swiglu?"),
        ("swiglu: 3\n", "--swiglu: ignored explicit argument '3'"),
        ("bf16: true\nfp16: true\n", "--fp16: not allowed with argument --bf16"),
        ("a: [1\nb: 2\n", "not valid YAML at line 2"),
        ("- 1\n", "must hold `key: value` lines, not a list"),
        ("", "must hold `key: value` lines, not nothing"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        load_preset(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml cannot be read: No such file"):
        load_preset(str(tmp_path / "absent.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_preset(str(tmp_path / "folder.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not"):
        load_preset(str(tmp_path / "bytes.yaml"))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'kimi-k2': did you mean kimi_k2\? There are .*tiny"):
        load_preset("kimi-k2")
