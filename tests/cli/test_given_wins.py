"""What is given beside a preset or a config.json takes the place of what these state, and of what follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape


def model(*words: str) -> ModelShape:
    shape = parse(["--dry-run", *words]).scenario.model
    assert shape is not None
    return shape


def scenario(line: str) -> Scenario:
    return parse(["--dry-run", *line.split()]).scenario


@pytest.mark.parametrize(("layers", "routed"), [(2, (False, True)), (6, (False, *[True] * 5))])
def test_a_list_of_layers_follows_their_number(layers: int, routed: tuple[bool, ...]) -> None:
    run = scenario(f"--model tiny_deepseek_v3 --num-layers {layers}")
    assert run.model is not None
    assert run.model.experts is not None
    assert run.model.experts.layers == routed
    assert run.notes == (f"1 of {layers} layers are dense: the preset's list of 4 layers, fitted to them",)
    own = model("--model", "tiny_deepseek_v3", "--num-layers", "2", "--moe-layer-freq", "[1,0]")
    assert own.experts is not None
    assert own.experts.layers == (True, False)


def test_a_vocabulary_of_one_kind_takes_the_place_of_the_other() -> None:
    assert model("--model", "kimi_k2", "--padded-vocab-size", "1024").padded_vocab_size(8) == 1024


def test_attention_of_one_kind_takes_the_place_of_the_other() -> None:
    latent = model("--model", "tiny_qwen3", "--multi-latent-attention")
    assert latent.mla is not None
    grouped = model("--model", "tiny_deepseek_v3", "--num-query-groups", "2")
    assert (grouped.mla, grouped.num_query_groups, grouped.kv_channels) == (None, 2, 32)


def test_sizes_that_follow_from_a_given_one_follow(tmp_path: Path) -> None:
    assert model("--model", "tiny", "--hidden-size", "512").kv_channels == 64
    values = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 256,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 2,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    given = model("--hf-config", str(path), "--moe-ffn-hidden-size", "48", "--num-layers", "7")
    assert given.experts is not None
    assert given.experts.shared_ffn_hidden_size == 96
    assert given.experts.layers == (False, False, True, False, True, False, True)


GLM_4_5 = (
    "--num-layers 92 --hidden-size 5120 --num-attention-heads 96 --num-query-groups 8 --kv-channels 128 --swiglu "
    "--ffn-hidden-size 12288 --num-experts 160 --moe-router-topk 8 --moe-ffn-hidden-size 1536 --add-qkv-bias "
    "--moe-shared-expert-intermediate-size 1536 --moe-layer-freq ([0]*3+[1]*89) --moe-router-enable-expert-bias "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --qk-layernorm "
    "--untie-embeddings-and-output-weights --vocab-size 151552"
)


def test_what_is_assumed_of_the_ranks_where_etp_is_given() -> None:
    """GLM-4.5's published TP8 PP4 EP16 ETP1 runs on 64 GPUs, its sizes ask for TP x EP x PP of them."""
    sizes = "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --expert-model-parallel-size 16"
    run = scenario(f"{GLM_4_5} {sizes} --expert-tensor-parallel-size 1")
    assert (run.source.world_size, run.destination.world_size) == (512, 512)
    note = "assumed: TP x EP x PP = 512 source ranks, --source-world-size 64 would do: experts fold over TP x DP"
    assert run.notes[-1] == note
    given = scenario(f"{GLM_4_5} {sizes} --expert-tensor-parallel-size 1 --source-world-size 128")
    assert (given.source.world_size, given.notes) == (128, ())
    assert scenario(f"{GLM_4_5} {sizes}").source.world_size == 512


def test_flags_of_rl_scripts_are_recorded() -> None:
    run = scenario(
        "--model tiny --rl-parallel-generation-tasks 128 --use-rotary-position-embeddings --no-position-embedding"
    )
    assert run.recorded == {"rl-parallel-generation-tasks": 128, "no-position-embedding": True}
    assert run.model is not None
    assert run.model.position_embedding_type == "rope"
