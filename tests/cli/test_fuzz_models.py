"""Random models on random sides of every format: each ends in a plan or in one line, also in a search for layouts.

REFIT_FUZZ_EXAMPLES is the number of command lines, for long runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.config.flag_names import FORMAT_FLAGS, PIPELINE_LAYOUT_FLAGS, SIZE_FLAGS
from refit.config.registry import FORMATS
from refit.errors import RefitError
from refit.predict.dry_run import dry_run
from refit.sweep.search import Search

EXAMPLES = int(os.environ.get("REFIT_FUZZ_EXAMPLES", "120"))
MAX_RANKS = 32
SMALL = st.sampled_from((1, 2, 3, 4, 8))
WIDTH = st.sampled_from((1, 7, 32, 64, 96, 128, 256))
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("num-layers", "num-attention-heads", "num-query-groups", "num-experts", "moe-router-topk"), SMALL),
    **dict.fromkeys(("hidden-size", "kv-channels", "ffn-hidden-size", "moe-ffn-hidden-size", "moe-latent-size"), WIDTH),
    **dict.fromkeys(("q-lora-rank", "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim"), WIDTH),
    **dict.fromkeys(("moe-shared-expert-intermediate-size", "max-position-embeddings"), WIDTH),
    **dict.fromkeys(("vocab-size", "padded-vocab-size"), st.sampled_from((1, 100, 250, 512))),
    "make-vocab-size-divisible-by": st.sampled_from((1, 3, 128)),
    "mtp-num-layers": st.integers(0, 3),
    "position-embedding-type": st.sampled_from(("rope", "none", "learned_absolute")),
    "normalization": st.sampled_from(("RMSNorm", "LayerNorm")),
    "moe-layer-freq": st.sampled_from(("1", "2", "[0,1]", "[1]*4", "([0]*1+[1]*3)", "[0]*4")),
    "transformer-impl": st.sampled_from(("local", "transformer_engine")),
    "experimental-attention-variant": st.just("gated_delta_net"),
    "linear-attention-freq": st.sampled_from(("1", "2", "4", "[0,1]", "[1]*4", "([1]*1+[0]*1)*2")),
    **dict.fromkeys(("linear-num-key-heads", "linear-num-value-heads", "linear-conv-kernel-dim"), SMALL),
    **dict.fromkeys(("linear-key-head-dim", "linear-value-head-dim"), WIDTH),
}
SWITCHES = (
    *("swiglu", "disable-bias-linear", "add-qkv-bias", "untie-embeddings-and-output-weights", "qk-layernorm"),
    *("group-query-attention", "multi-latent-attention", "moe-router-enable-expert-bias", "moe-grouped-gemm"),
    *("attention-output-gate", "moe-shared-expert-gate"),
    *("use-rotary-position-embeddings", "no-position-embedding", "bf16", "fp16", "fp32"),
)
SIDES: dict[str, st.SearchStrategy[Any]] = {
    **{flag: st.sampled_from((1, 1, 2, 2, 3, 4)) for flags in SIZE_FLAGS.values() for flag in flags},
    **dict.fromkeys(("fsdp-replicate-size", "rl-inference-fsdp-replicate-size"), SMALL),
    **dict.fromkeys(("rl-inference-data-parallel-size", "rl-inference-replicas"), st.sampled_from((1, 2))),
    "rl-inference-num-redundant-experts": SMALL,
    "rl-inference-expert-placement": st.sampled_from(("linear", "round_robin")),
    "rl-inference-expert-placement-next": st.sampled_from(("linear", "round_robin")),
    "zero-stage": st.integers(0, 2),
    "attn-impl": st.sampled_from(("sdpa", "eager")),
    "rl-inference-dtype": st.sampled_from(("bf16", "fp8-block", "mxfp8")),
    "fp8-keep-bf16": st.sampled_from(("embedding", "linear", "nomatch", "linear_qkv,router,word_embeddings")),
    "quantise": st.sampled_from(("source", "destination", "auto")),
    "refit-mode": st.sampled_from(("collocated", "non-collocated")),
    "measure": st.sampled_from(("refit", "refit,train-step", "train-step", "forward")),
    "seq-length": st.sampled_from((8, 64)),
    "num-layers-per-virtual-pipeline-stage": SMALL,
}
STAGES = st.lists(st.sampled_from(("", "t", "tt", "t*2", "tm", "m", "ttmm")), min_size=1, max_size=4)
LAYOUTS = STAGES.map(lambda stages: f"E{'|'.join(stages)}L") | st.sampled_from(("Et*2|tt|mL", "E||t|L", "Et|(t|)*2tL"))
NAMED = (
    "tiny_llama",
    "tiny_qwen2",
    "tiny_mixtral",
    "tiny_glm4_moe",
    "tiny_glm4_moe_lite",
    "tiny_minimax_m2",
    "tiny_gpt_oss",
    "tiny_qwen3",
    "tiny_qwen3_moe",
    "tiny_qwen3_next",
    "tiny_deepseek_v3",
)
PRESETS = ("tiny", *NAMED)
PLAIN = ("--num-layers=4", "--hidden-size=64", "--num-attention-heads=4")
SIZED: dict[str, int] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", **SIZED},
    {"model_type": "qwen2", **SIZED, "head_dim": None},
    {"model_type": "mixtral", **SIZED, "num_experts_per_tok": 2, "num_local_experts": 8},
    {"model_type": "deepseek_v2", **SIZED, **ROUTED, **LATENT, "head_dim": 8, "num_key_value_heads": 4},
    {"model_type": "qwen3", **SIZED},
    {"model_type": "qwen3_moe", **SIZED, **ROUTED, "num_experts": 8},
    {
        "model_type": "qwen3_next",
        **SIZED,
        **ROUTED,
        "num_experts": 8,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "full_attention_interval": 2,
        "layer_types": None,
    },
    {"model_type": "deepseek_v3", **SIZED, **ROUTED, **LATENT, "head_dim": 8, "num_key_value_heads": 4},
    {"model_type": "gpt_oss", **SIZED, "num_experts_per_tok": 2, "num_local_experts": 8},
    {"model_type": "minimax_m2", **SIZED, "num_experts_per_tok": 2, "num_local_experts": 8},
    {"model_type": "glm4_moe_lite", **SIZED, **ROUTED, **LATENT, "head_dim": 8, "mlp_layer_types": ["sparse"] * 4},
    {"model_type": "glm4_moe", **SIZED, **ROUTED, "n_routed_experts": 8, "first_k_dense_replace": 1},
)
CHANGES = st.dictionaries(
    st.sampled_from((*{key for config in CONFIGS for key in config}, "moe_layer_freq", "first_k_dense_replace", "x")),
    st.sampled_from((None, 0, 1, 2, 3, 64, -1, "1", True, [1], {})),
    max_size=2,
)


@st.composite
def words(draw: st.DrawFn) -> tuple[list[str], dict[str, Any] | None]:
    """A command line, and the config.json that it is to read, if any."""
    start = draw(st.sampled_from((*PRESETS, *NAMED, *NAMED, PLAIN, *CONFIGS)))
    found = [f"--model={start}"] if isinstance(start, str) else [*start] if isinstance(start, tuple) else []
    config = {**start, **draw(CHANGES)} if isinstance(start, dict) else None
    for values, most in ((NUMBERS, 3), (SIDES, 3)):
        # Most command lines have few flags, so that some of them can be planned.
        chosen = draw(st.lists(st.sampled_from(sorted(values)), max_size=draw(st.integers(0, most)), unique=True))
        found += [f"--{name}={draw(values[name])}" for name in chosen]
    found += [
        f"--{name}" for name in draw(st.lists(st.sampled_from(SWITCHES), max_size=draw(st.integers(0, 2)), unique=True))
    ]
    for place, flag in enumerate(FORMAT_FLAGS):
        names = [name for name, row in FORMATS.items() if place or not row.destination_only]
        found.append(f"--{flag}={draw(st.sampled_from(names))}")
    for flag in PIPELINE_LAYOUT_FLAGS:
        if draw(st.integers(0, 5)) == 0:
            text = draw(LAYOUTS)
            found.append(f"--{flag}={text}")
            if "*" not in text:
                found.append(f"--{flag.replace('layout', 'size')}={text.count('|') + 1}")
    return found, config


def plan(line: list[str], config: dict[str, Any] | None) -> None:
    with tempfile.TemporaryDirectory() as folder, one_line():
        if config is not None:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config))
            line = [*line, f"--hf-config={path}"]
        request = parse(["--dry-run", *line])
        if request.dry_run is not None and request.scenario.num_ranks <= MAX_RANKS:
            dry_run(request.scenario, request.dry_run)


def search(line: list[str], destination: str) -> None:
    with one_line():
        Search(
            common=tuple(line),
            source="TP1 EP1",
            source_gpus=None,
            destination_gpus=2,
            cluster=load_cluster("h100_ib400"),
            gpus_per_node=8,
            destination_formats=(destination,),
            max_pp=2,
            max_plans=1,
        ).run()


@contextlib.contextmanager
def one_line() -> Any:
    """Anything but a RefitError of one line goes on to the test."""
    message = "planned"
    try:
        yield
    except RefitError as error:
        message = str(error)
    assert len(message.splitlines()) == 1


RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(RELAXED, max_examples=EXAMPLES)
@given(words())
def test_a_model_on_two_sides_ends_in_a_plan_or_one_line(drawn: tuple[list[str], dict[str, Any] | None]) -> None:
    plan(*drawn)


@settings(RELAXED, max_examples=EXAMPLES // 10)
@given(st.sampled_from((*PRESETS, "")), st.sampled_from([name for name, row in FORMATS.items() if row.serves]), words())
def test_a_search_ends_in_layouts_or_one_line(preset: str, destination: str, drawn: tuple[list[str], Any]) -> None:
    sides = {flag for flags in SIZE_FLAGS.values() for flag in flags} | {*FORMAT_FLAGS, *PIPELINE_LAYOUT_FLAGS}
    own = {flag for flag in SIDES if "rl-inference" in flag} | sides | {"refit-mode", "measure"}
    line = [word for word in drawn[0] if word[2:].partition("=")[0] not in {*own, "model"}]
    search([f"--model={preset}", *line] if preset else [*PLAIN, *line], destination)
