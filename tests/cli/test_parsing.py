"""Command lines: those that must work as they stand, what they mean, and what is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from refit.cli.launch import check_launch
from refit.cli.main import main
from refit.cli.parsing import Request, parse
from refit.config.registry import ENGINES, Engine
from refit.config.scenario import Mode, Scenario, Verify, check_num_ranks
from refit.config.shape import Dtype, LatentAttention, ModelShape
from refit.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512 "
    "--micro-batch-size 1 --num-experts 16 --moe-router-topk 2 --moe-shared-expert-intermediate-size 512 "
    "--ffn-hidden-size 2688"
)
EP_REFIT = (
    "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
    "--rl-inference-tensor-model-parallel-size 2 --rl-inference-expert-model-parallel-size 1 "
    "--rl-inference-expert-tensor-model-parallel-size 1 --refit-mode non-collocated --refit-method nvshmem "
    f"{SMALL} --disable-bias-linear --num-benchmark-iterations 3"
)
KIMI_K2_BY_FLAGS = (
    "--tensor-model-parallel-size 8 --expert-model-parallel-size 8 --rl-inference-tensor-model-parallel-size 8 "
    "--rl-inference-expert-model-parallel-size 4 --refit-mode non-collocated --refit-method nvshmem --num-layers 61 "
    "--hidden-size 7168 --num-attention-heads 64 --seq-length 4096 --max-position-embeddings 131072 "
    "--micro-batch-size 1 --num-experts 384 --moe-router-topk 8 --moe-shared-expert-intermediate-size 2048 "
    "--ffn-hidden-size 18432 --num-benchmark-iterations 5"
)
MINIMAL_TEST = (
    "--tensor-model-parallel-size 2 --expert-model-parallel-size 1 --rl-inference-tensor-model-parallel-size 1 "
    "--rl-inference-expert-model-parallel-size 1 --refit-mode non-collocated --refit-method nvshmem --num-layers 2 "
    "--hidden-size 512 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 "
    "--num-experts 8 --moe-router-topk 2 --moe-shared-expert-intermediate-size 256 --ffn-hidden-size 1344 "
    "--num-benchmark-iterations 2"
)
TWO_HEADS = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --refit-method gloo"
TWO_STAGES = f"{TWO_HEADS} --pipeline-model-parallel-size 2"


def sizes(src_tp: int, src_ep: int, dst_tp: int, dst_ep: int, mode: str, method: str) -> str:
    return (
        f"--tensor-model-parallel-size {src_tp} --expert-model-parallel-size {src_ep} "
        f"--rl-inference-tensor-model-parallel-size {dst_tp} --rl-inference-expert-model-parallel-size {dst_ep} "
        f"--refit-mode {mode} --refit-method {method}"
    )


def scenario(line: str) -> Scenario:
    return parse(line.split()).scenario


def shape(line: str) -> ModelShape:
    model = scenario(f"{line} --refit-method gloo" if "--refit-method" not in line else line).model
    assert model is not None
    return model


@pytest.mark.parametrize(
    ("line", "title", "source", "destination"),
    [
        (EP_REFIT, "TP2 EP2 ETP1 -> TP2 EP1 ETP1", range(4), range(4, 6)),
        (f"{sizes(2, 2, 2, 2, 'non-collocated', 'nvshmem')} {SMALL}", "TP2 EP2 -> TP2 EP2", range(4), range(4, 8)),
        (f"{sizes(4, 1, 2, 1, 'non-collocated', 'nvshmem')} {SMALL}", "TP4 EP1 -> TP2 EP1", range(4), range(4, 6)),
        (MINIMAL_TEST, "TP2 EP1 -> TP1 EP1", range(2), range(2, 3)),
        (f"{sizes(4, 1, 4, 1, 'non-collocated', 'nvshmem')} {SMALL}", "TP4 EP1 -> TP4 EP1", range(4), range(4, 8)),
        (f"{sizes(1, 4, 1, 2, 'non-collocated', 'nvshmem')} {SMALL}", "TP1 EP4 -> TP1 EP2", range(4), range(4, 6)),
        (f"{sizes(4, 2, 2, 4, 'collocated', 'nccl')} {SMALL}", "TP4 EP2 -> TP2 EP4", range(8), range(8)),
        (f"{sizes(8, 1, 4, 2, 'collocated', 'nccl')} {SMALL}", "TP8 EP1 -> TP4 EP2", range(8), range(8)),
        (f"{sizes(4, 2, 4, 1, 'collocated', 'nccl')} {SMALL}", "TP4 EP2 -> TP4 EP1", range(8), range(4)),
        (f"{sizes(2, 2, 2, 1, 'collocated', 'nccl')} {SMALL}", "TP2 EP2 -> TP2 EP1", range(4), range(2)),
        (KIMI_K2_BY_FLAGS, "TP8 EP8 -> TP8 EP4", range(64), range(64, 96)),
    ],
)
def test_command_lines_that_must_work_as_they_stand(line: str, title: str, source: range, destination: range) -> None:
    run = scenario(line)
    assert run.title == title
    assert (run.source.ranks, run.destination.ranks) == (source, destination)


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [
        ((8, 8, 8, 4, "non-collocated", "nvshmem"), 96),
        ((16, 4, 8, 4, "non-collocated", "nvshmem"), 96),
        ((16, 4, 16, 2, "non-collocated", "nvshmem"), 96),
        ((16, 4, 32, 2, "non-collocated", "nvshmem"), 128),
        ((8, 8, 16, 4, "non-collocated", "nvshmem"), 128),
        ((16, 8, 8, 16, "collocated", "nccl"), 128),
        ((32, 4, 16, 8, "collocated", "nccl"), 128),
    ],
)
def test_the_seven_kimi_k2_scenarios(layout: tuple[int, int, int, int, str, str], num_ranks: int) -> None:
    run = scenario(f"--model kimi_k2 {sizes(*layout)}")
    assert run.num_ranks == num_ranks
    assert run.source.layout.etp == layout[0]
    assert run.destination.layout.etp == layout[2]
    assert run.notes == ()


def test_what_a_command_line_means() -> None:
    run = scenario(EP_REFIT)
    assert (run.mode, run.method, run.engines, run.measurements, run.verify) == (
        Mode.NON_COLLOCATED,
        "nvshmem",
        ("refit",),
        ("refit",),
        Verify.FULL,
    )
    assert (run.num_warmup, run.num_iterations, run.staging_bytes, run.timeout_s) == (2, 3, 512 << 20, 300.0)
    assert run.recorded == {"seq-length": 512, "micro-batch-size": 1}
    assert run.notes == ()
    model = run.model
    assert model is not None
    assert (model.num_layers, model.hidden_size, model.kv_channels, model.num_query_groups) == (4, 1024, 128, 8)
    assert (model.ffn_hidden_size, model.max_position_embeddings) == (2688, 512)
    for side in run.sides.values():
        assert (side.format, side.dtype, side.transformer_impl) == ("megatron", Dtype.BF16, "local")
    assert model.experts is not None
    assert (model.experts.num_experts, model.experts.topk, model.experts.layers) == (16, 2, (True,) * 4)
    assert (model.experts.ffn_hidden_size, model.experts.shared_ffn_hidden_size) == (2688, 512)


def test_run_flags() -> None:
    run = scenario(
        f"{TWO_HEADS} --refit-engine both --verify sample --check-forward --staging-mib 64 --timeout 12.5 "
        "--num-benchmark-warmup 0 --num-benchmark-iterations=7 --output-dir out --one-sided-buffers direct "
        "--nvshmem-force-put --device cuda --profile-refit "
        "--transformer-impl transformer_engine"
    )
    assert (run.engines, run.verify, run.check_forward, run.staging_bytes) == (
        ("refit", "megatron"),
        Verify.SAMPLE,
        True,
        64 << 20,
    )
    assert (run.timeout_s, run.num_warmup, run.num_iterations, run.output_dir) == (12.5, 0, 7, Path("out"))
    assert (run.one_sided_buffers, run.nvshmem_force_put) == ("direct", True)
    assert {side.transformer_impl for side in run.sides.values()} == {"transformer_engine"}
    assert (run.device, run.profile) == ("cuda", True)


def test_the_old_spelling_of_one_sided_buffers() -> None:
    assert scenario(f"{TWO_HEADS} --nvshmem-buffers direct").one_sided_buffers == "direct"
    assert scenario(TWO_HEADS).one_sided_buffers == "ring"


@pytest.mark.parametrize(
    ("text", "engines"), [("both", ("refit", "megatron")), ("megatron,refit,megatron", ("megatron", "refit"))]
)
def test_engines_run_in_the_order_given(text: str, engines: tuple[str, ...]) -> None:
    assert scenario(f"{TWO_HEADS} --refit-engine {text}").engines == engines


def test_an_engine_that_cannot_refit_a_sides_format_is_refused() -> None:
    row = Engine(engine="nowhere:Nothing", title="Picky", formats=("fsdp2",))
    with (
        ENGINES.added("picky", row),
        pytest.raises(UsageError, match="--refit-engine picky refits fsdp2 sides only, one side is megatron"),
    ):
        scenario(f"{TWO_HEADS} --refit-engine refit,picky")


FORWARD_FLAGS = [
    ("", "moe-token-dispatcher-type", "alltoall", "allgather"),
    ("", "moe-token-dispatcher-type", "flex", "allgather"),
    ("", "moe-router-score-function", "sigmoid", "softmax"),
    ("--moe-router-enable-expert-bias", "moe-router-score-function", "softmax", "sigmoid"),
]


@pytest.mark.parametrize(("model", "flag", "given", "runs_with"), FORWARD_FLAGS)
def test_a_forward_pass_that_runs_otherwise_is_refused(
    model: str,
    flag: str,
    given: str,
    runs_with: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    line = f"{TWO_HEADS} --num-experts 4 {model}"
    assert main(f"{line} --{flag} {given} --check-forward".split()) == 2
    assert capsys.readouterr().err == (
        f"error: --{flag} {given} contradicts --check-forward, whose forward pass runs with {runs_with}: "
        "leave one out\n"
    )
    assert scenario(f"{line} --{flag} {given}").recorded == {flag: given}
    accepted = scenario(f"{line} --{flag} {runs_with} --check-forward")
    assert (accepted.recorded, accepted.check_forward) == ({flag: runs_with}, True)


def test_defaults_are_those_of_megatron() -> None:
    model = shape(TWO_HEADS)
    assert (model.ffn_hidden_size, model.kv_channels, model.num_query_groups) == (256, 16, 4)
    assert (model.normalization, model.position_embedding_type) == ("LayerNorm", "learned_absolute")
    assert (model.add_bias_linear, model.tied_embeddings, model.swiglu, model.experts, model.mla) == (
        True,
        True,
        False,
        None,
        None,
    )
    assert (model.vocab_size, model.make_vocab_size_divisible_by) == (32768, 128)
    assert shape("--num-layers 1 --hidden-size 1024 --num-attention-heads 8 --swiglu").ffn_hidden_size == 2688
    assert shape(f"{TWO_HEADS} --multi-latent-attention").mla == LatentAttention(None, 32, 128, 64, 128)
    assert shape(f"{TWO_HEADS} --group-query-attention").num_query_groups == 1
    assert shape(f"{TWO_HEADS} --num-query-groups 2").num_query_groups == 2
    experts = shape(f"{TWO_HEADS} --num-experts 8").experts
    assert experts is not None
    assert (experts.topk, experts.ffn_hidden_size, experts.shared_ffn_hidden_size) == (2, 256, None)


def test_style_flags() -> None:
    run = scenario(
        f"{TWO_HEADS} --fp32 --normalization RMSNorm --use-rotary-position-embeddings --disable-bias-linear "
        "--add-qkv-bias --untie-embeddings-and-output-weights --qk-layernorm --kv-channels 32 --padded-vocab-size 1000"
    )
    model = run.model
    assert model is not None
    assert [side.dtype for side in run.sides.values()] == [Dtype.FP32] * 2
    assert (model.normalization, model.position_embedding_type) == ("RMSNorm", "rope")
    assert (model.add_bias_linear, model.add_qkv_bias, model.tied_embeddings, model.qk_layernorm) == (
        False,
        True,
        False,
        True,
    )
    assert (model.kv_channels, model.padded_vocab_size(2)) == (32, 1000)


@pytest.mark.parametrize(
    ("frequency", "layers"),
    [
        ("1", (True, True, True, True)),
        ("2", (True, False, True, False)),
        ("([0]*1+[1]*3)", (False, True, True, True)),
        ("([0]+[1])*2", (False, True, False, True)),
        ("[0,1,1,1]", (False, True, True, True)),
    ],
)
def test_moe_layer_frequency(frequency: str, layers: tuple[bool, ...]) -> None:
    argv = ["--num-layers=4", "--hidden-size=64", "--num-attention-heads=4", "--num-experts=4", "--refit-method=gloo"]
    model = parse([*argv, "--moe-layer-freq", frequency]).scenario.model
    assert model is not None
    assert model.experts is not None
    assert model.experts.layers == layers


def test_flags_override_the_preset() -> None:
    run = scenario("--refit-method gloo --model tiny --num-layers 2 --moe-layer-freq 1 --fp32 --num-experts=4")
    model = run.model
    assert model is not None
    assert (model.num_layers, model.hidden_size, run.source.dtype) == (2, 256, Dtype.FP32)
    assert model.experts is not None
    assert (model.experts.num_experts, model.experts.layers) == (4, (True, True))
    assert run.model_name == "tiny"


def test_a_destination_takes_the_sources_sizes_where_it_has_none_but_etp() -> None:
    run = scenario(f"{TWO_HEADS} --num-experts 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                   "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1")  # fmt: skip
    destination = run.destination.layout
    assert (destination.tp, destination.pp, destination.ep, destination.etp) == (2, 2, 2, 2)
    assert (run.source.layout.etp, run.source.world_size, run.num_ranks) == (1, 8, 16)


def test_experts_folded_over_data_parallel_ranks() -> None:
    run = scenario(
        f"{TWO_HEADS} --num-experts 8 --source-world-size 4 --expert-model-parallel-size 4 "
        "--destination-world-size 2 --rl-inference-expert-model-parallel-size 1"
    )
    source, destination = run.source.layout, run.destination.layout
    assert (source.dp, source.edp, destination.dp, run.num_ranks) == (4, 1, 2, 6)


def test_uneven_stages_of_each_side() -> None:
    run = scenario(
        f"{TWO_HEADS} --num-layers 5 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2 "
        "--rl-inference-decoder-last-pipeline-num-layers 1"
    )
    assert run.source.layout.stage_layers(5) == (range(2), range(2, 5))
    assert run.destination.layout.stage_layers(5) == (range(4), range(4, 5))


def test_virtual_stages_of_each_side() -> None:
    """By their number or by the layers of a chunk; the destination has none of its own accord."""
    plain = scenario(f"{TWO_STAGES} --num-layers 8 --num-virtual-stages-per-pipeline-rank 2")
    assert (plain.source.layout.vpp, plain.destination.layout.vpp) == (2, 1)
    assert (plain.title, plain.source.layout.summary) == ("TP1 EP1 PP2 VPP2 -> TP1 EP1 PP2", "TP=1, PP=2, VPP=2, EP=1")
    assert plain.source.layout.chunk_layers(8) == ((range(2), range(4, 6)), (range(2, 4), range(6, 8)))
    both = scenario(
        f"{TWO_STAGES} --num-layers 8 --num-layers-per-virtual-pipeline-stage 1 "
        "--rl-inference-num-layers-per-virtual-pipeline-stage 2"
    )
    assert (both.source.layout.vpp, both.destination.layout.vpp) == (4, 2)


def test_token_prediction_and_latent_experts() -> None:
    flags = f"{TWO_HEADS} --position-embedding-type rope --num-experts 4 --moe-latent-size 32"
    model = shape(f"{flags} --mtp-num-layers 2")
    assert (model.mtp_num_layers, model.experts and model.experts.latent_size) == (2, 32)
    assert shape(f"{flags} --mtp-num-layers 0") == shape(flags)


def test_biases_that_megatron_cannot_build_are_dropped_with_one_note() -> None:
    shared = scenario(f"{TWO_HEADS} --num-experts 4 --moe-shared-expert-intermediate-size 64")
    assert shared.model is not None
    assert not shared.model.add_bias_linear
    assert len(shared.notes) == 1
    assert "shared experts" in shared.notes[0]
    wide = scenario(f"{TWO_HEADS} --num-experts 4 --rl-inference-tensor-model-parallel-size 2")
    assert wide.model is not None
    assert not wide.model.add_bias_linear
    assert "ETP > 1 (here 2)" in wide.notes[0]
    plain = scenario(f"{TWO_HEADS} --num-experts 4")
    assert plain.model is not None
    assert plain.model.add_bias_linear
    assert plain.notes == ()


def test_experts_as_wide_as_the_dense_mlp_are_pointed_out() -> None:
    notes = scenario(KIMI_K2_BY_FLAGS).notes
    assert "each of 384 experts is as wide as the dense MLP, 18432: 6.19 T parameters" in notes[-1]
    assert "9.284 T parameters" in scenario(f"{KIMI_K2_BY_FLAGS} --swiglu").notes[-1]
    assert scenario(EP_REFIT).notes == ()
    assert scenario(f"{KIMI_K2_BY_FLAGS} --moe-ffn-hidden-size 2048 --disable-bias-linear").notes == ()


def test_flags_that_change_no_weight_are_recorded() -> None:
    run = scenario(
        f"{TWO_HEADS} --use-mcore-models --global-batch-size 64 --train-iters 10 --lr 1e-5 --split 99,1,0 "
        "--tokenizer-type NullTokenizer --sequence-parallel --no-rope-fusion --attention-backend flash "
        "--recompute-modules core_attn mlp --moe-token-dispatcher-type alltoall --context-parallel-size 1 "
        "--rotary-base 1000000 --data-path a b c --swiglu"
    )
    assert run.recorded is not None
    assert run.recorded["use-mcore-models"] is True
    assert run.recorded["global-batch-size"] == 64
    assert run.recorded["lr"] == 1e-5
    assert run.recorded["recompute-modules"] == ["core_attn", "mlp"]
    assert run.recorded["data-path"] == ["a", "b", "c"]
    assert run.recorded["context-parallel-size"] == "1"
    assert run.model is not None
    assert run.model.swiglu


BAD_LINES = [
    (f"{TWO_HEADS} --num-layers 0", "--num-layers: must be at least 1, got 0"),
    (f"{TWO_HEADS} --hidden-size -64", "--hidden-size: must be at least 1, got -64"),
    (f"{TWO_HEADS} --hidden-size=6.4", "--hidden-size: expected a whole number, got '6.4'"),
    (f"{TWO_HEADS} --tensor-model-parallel-size 0", "--tensor-model-parallel-size: must be at least 1, got 0"),
    (f"{TWO_HEADS} --seq-length -1", "--seq-length: must be at least 1, got -1"),
    (f"{TWO_HEADS} --num-experts 0", "--num-experts: must be at least 1, got 0"),
    (f"{TWO_HEADS} --num-benchmark-iterations 0", "--num-benchmark-iterations: must be at least 1, got 0"),
    (f"{TWO_HEADS} --num-benchmark-warmup -1", "--num-benchmark-warmup: must be at least 0, got -1"),
    (
        f"{TWO_HEADS} --refit-method shm --device cuda",
        "--refit-method shm moves weights on cpu only: leave --device cuda",
    ),
    (f"{TWO_HEADS} --timeout 0", "--timeout: must be a positive number of seconds, got 0"),
    (f"{TWO_HEADS} --timeout nan", "--timeout: must be a positive number of seconds, got nan"),
    (f"{TWO_HEADS} --num-layers", "--num-layers: expected one argument"),
    (f"{TWO_HEADS} --tensor-model-parallel-size 3", "source: 4 attention heads cannot be divided by TP size 3"),
    (f"{TWO_HEADS} --num-experts 6 --expert-model-parallel-size 4", "6 experts cannot be divided by EP size 4"),
    (f"{TWO_HEADS} --expert-model-parallel-size 2", "EP size 2 needs experts"),
    (f"{TWO_HEADS} --rl-inference-pipeline-model-parallel-size 3", "2 layers do not divide by pipeline size 3"),
    (f"{TWO_HEADS} --num-attention-heads 5", "hidden size 64 cannot be divided by 5 attention heads"),
    (f"{TWO_HEADS} --num-query-groups 3", "4 attention heads cannot be divided by 3 query groups"),
    (f"{TWO_HEADS} --padded-vocab-size 1001 --tensor-model-parallel-size 2", "1001 cannot be divided by TP size 2"),
    (f"{TWO_HEADS} --padded-vocab-size 512 --vocab-size 500", "--vocab-size contradicts --padded-vocab-size"),
    (
        f"{TWO_HEADS} --source-world-size 3 --tensor-model-parallel-size 2",
        "source: 3 ranks cannot be divided into TP x PP",
    ),
    (f"{TWO_HEADS} --num-experts 4 --expert-tensor-parallel-size 2", "ETP x EP x PP = 2"),
    (f"{TWO_HEADS} --decoder-first-pipeline-num-layers 1", "there is one stage: raise PP"),
    (f"{TWO_HEADS} --bf16 --fp16", "--fp16: not allowed with argument --bf16"),
    (f"{TWO_HEADS} --q-lora-rank 8", "--q-lora-rank needs --multi-latent-attention"),
    (f"{TWO_HEADS} --qk-head-dim 8", "--qk-head-dim needs --multi-latent-attention"),
    (
        f"{TWO_HEADS} --multi-latent-attention --num-query-groups 2",
        "--num-query-groups contradicts --multi-latent-attention",
    ),
    (f"{TWO_HEADS} --moe-ffn-hidden-size 8", "--moe-ffn-hidden-size needs --num-experts"),
    (f"{TWO_HEADS} --moe-grouped-gemm", "--moe-grouped-gemm needs --num-experts"),
    (f"{TWO_HEADS} --num-experts 4 --moe-router-topk 5", "--moe-router-topk 5 is more than the 4 experts"),
    (f"{TWO_HEADS} --num-experts 4 --moe-layer-freq [0,1,1]", "--moe-layer-freq lists 3 layers, the model has 2"),
    (f"{TWO_HEADS} --num-experts 4 --moe-layer-freq [2,1]", "expected a number or a list of 0 and 1"),
    (f"{TWO_HEADS} --num-experts 4 --moe-layer-freq [exit()]", "expected a number or a list of 0 and 1"),
    (f"{TWO_HEADS} --num-experts 4 --moe-layer-freq [0]*99999*99999", "expected a number or a list of 0 and 1"),
    (f"{TWO_HEADS} --hiden-size 64", "unknown flag --hiden-size: did you mean --hidden-size?"),
    (f"{TWO_HEADS} --num-layer=2", "unknown flag --num-layer: did you mean --num-layers?"),
    (f"{TWO_HEADS} --tensor-parallel 2", "unknown flag --tensor-parallel"),
    (f"{TWO_HEADS} --moe-ffn-hiden-size 8", "unknown flag --moe-ffn-hiden-size: did you mean --moe-ffn-hidden-size?"),
    (f"{TWO_HEADS} --log-interval 5 6", "unexpected argument '6'"),
    (f"{TWO_HEADS} --zzz", "unknown flag --zzz: no known flag is close to it"),
    (f"{TWO_HEADS} 7", "unexpected argument '7'"),
    (f"{TWO_HEADS} --refit-method smoke", "--refit-method: invalid choice: 'smoke'"),
    (f"{TWO_HEADS} --refit-mode both", "--refit-mode: invalid choice: 'both'"),
    (
        f"{TWO_HEADS} --refit-engine refit,rfit",
        "--refit-engine: invalid choice: 'rfit' (choose from refit, megatron, nccl-m2n, both)",
    ),
    (f"{TWO_HEADS} --position-embedding-type alibi", "--position-embedding-type: invalid choice: 'alibi'"),
    (f"{TWO_HEADS} --context-parallel-size 2", "--context-parallel-size: 2 is not supported"),
    (f"{TWO_HEADS} --mtp-num-layers 1", "1 multi-token prediction layers need --position-embedding-type rope or none"),
    (
        f"{TWO_HEADS} --mtp-num-layers 1 --position-embedding-type rope --rl-inference-pipeline-model-parallel-size 2",
        "destination: Megatron cannot tie the output layer to the embedding with 1 multi-token prediction layers on PP "
        "size 2",
    ),
    (f"{TWO_HEADS} --mtp-num-layers 1001", "--mtp-num-layers: must be at most 1,000"),
    (f"{TWO_HEADS} --moe-latent-size 8", "--moe-latent-size needs --num-experts"),
    (
        f"{TWO_HEADS} --num-virtual-stages-per-pipeline-rank 2",
        "source: 2 virtual pipeline stages per rank need more than one pipeline stage, PP size is 1",
    ),
    (
        f"{TWO_STAGES} --rl-inference-num-virtual-stages-per-pipeline-rank 3 --num-layers 4",
        "2 layers of pipeline stage 0 cannot be divided into 3 virtual stages",
    ),
    (
        f"{TWO_STAGES} --num-layers-per-virtual-pipeline-stage 3 --num-layers 8",
        "source: 8 layers cannot be divided into chunks of 3 on PP size 2",
    ),
    (
        f"{TWO_STAGES} --num-layers-per-virtual-pipeline-stage 1 --num-virtual-stages-per-pipeline-rank 4",
        "--num-layers-per-virtual-pipeline-stage 1 contradicts --num-virtual-stages-per-pipeline-rank 4",
    ),
    (
        f"{TWO_STAGES} --num-layers-per-virtual-pipeline-stage 1 --decoder-first-pipeline-num-layers 1",
        "contradicts 1 layers on an uneven stage: give --num-virtual-stages-per-pipeline-rank",
    ),
    (
        "--model-provider a:b --refit-method gloo --pipeline-model-parallel-size 2 "
        "--rl-inference-num-layers-per-virtual-pipeline-stage 1",
        "destination: --rl-inference-num-layers-per-virtual-pipeline-stage 1 needs --num-layers: give "
        "--rl-inference-num-virtual-stages-per-pipeline-rank",
    ),
    (
        f"{TWO_STAGES} --num-layers 4 --num-virtual-stages-per-pipeline-rank 2 --refit-engine both",
        "--refit-engine megatron refits 1 model chunk per rank, virtual pipeline stages make 2",
    ),
    (f"{TWO_HEADS} --moe-shared-expert-gate", "--moe-shared-expert-gate is not supported"),
    (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4",
        "--refit-method missing: choose one of cuda-ipc, nvshmem, nccl",
    ),
    ("--num-layers 2 --refit-method gloo", "--hidden-size, --num-attention-heads missing"),
    ("--model nosuch --refit-method gloo", "unknown model 'nosuch'"),
    ("--model absent.yaml --refit-method gloo", "absent.yaml cannot be read"),
    ("--model-provider mine --refit-method gloo", "--model-provider: expected module:function, got 'mine'"),
    ("--model-provider a:b --num-layers 2 --refit-method gloo", "--num-layers contradicts --model-provider"),
    ("--model-provider a:b --model tiny --refit-method gloo", "contradicts --model-provider"),
    ("--model-provider a:b --dry-run", "a --model-provider has to be run"),
    ("--model tiny --refit-method gloo --num-gpus 8", "--num-gpus needs --dry-run"),
    ("--model tiny --dry-run --cluster nosuch", "unknown cluster 'nosuch'"),
    ("--model tiny --dry-run --num-gpus 1", "1 + 1 = 2 GPUs needed > 1 available"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_input_is_one_error_line_and_exit_code_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_only_rank_0_reports_a_usage_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--zzz"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["--zzz"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown flag --zzz")


def test_a_model_of_the_users_own_has_no_shape() -> None:
    run = scenario("--model-provider package.module:build --refit-method gloo --tensor-model-parallel-size 2")
    assert (run.model, run.model_provider, run.source.layout.tp) == (None, "package.module:build", 2)
    assert [side.dtype for side in run.sides.values()] == [None, None]


@pytest.mark.parametrize(
    ("line", "available", "message"),
    [
        (
            sizes(8, 1, 4, 1, "non-collocated", "nccl"),
            8,
            "8 + 4 = 12 GPUs needed > 8 available: lower --tensor-model-parallel-size or "
            "--rl-inference-tensor-model-parallel-size, or start 12 ranks",
        ),
        (
            sizes(4, 2, 4, 1, "collocated", "nccl"),
            4,
            "max(8, 4) = 8 GPUs needed > 4 available: lower --tensor-model-parallel-size or "
            "--expert-model-parallel-size, or start 8 ranks",
        ),
        (
            sizes(1, 1, 1, 1, "non-collocated", "nccl") + " --source-world-size 4",
            4,
            "4 + 1 = 5 GPUs needed > 4 available: lower --source-world-size, or start 5 ranks",
        ),
    ],
)
def test_too_few_ranks(line: str, available: int, message: str) -> None:
    run = scenario(f"{line} {SMALL} --moe-ffn-hidden-size 512")
    with pytest.raises(UsageError) as error:
        check_num_ranks(run, available)
    assert str(error.value) == message
    check_num_ranks(run, run.num_ranks)


def test_a_launch_is_checked_by_what_torchrun_sets() -> None:
    run = scenario(f"{sizes(4, 1, 2, 1, 'non-collocated', 'nccl')} {SMALL}")
    check_launch(run, {"RANK": "0", "WORLD_SIZE": "8"}, 8)
    with pytest.raises(UsageError, match=r"4 \+ 2 = 6 GPUs needed > 4 available"):
        check_launch(run, {"RANK": "0", "WORLD_SIZE": "4"}, 8)
    with pytest.raises(UsageError, match=r"torchrun --nproc-per-node 6 benchmark_refit.py"):
        check_launch(run, {}, 8)
    with pytest.raises(UsageError, match=r"torchrun --nnodes 2 --nproc-per-node 4 benchmark_refit.py"):
        check_launch(run, {}, 4)


def test_too_few_ranks_end_main_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "refit.bench.runner", None)
    assert main(f"{TWO_HEADS} --tensor-model-parallel-size 2".split()) == 2
    assert "2 + 2 = 4 GPUs needed > 2 available" in capsys.readouterr().err


def test_the_script_runs_dry_without_torch_and_megatron(tmp_path: Path) -> None:
    """From another directory, with imports of torch and Megatron made to fail."""
    for blocked in ("torch", "megatron"):
        (tmp_path / blocked).mkdir()
        (tmp_path / blocked / "__init__.py").write_text("raise ImportError('a dry run must not import this')\n")
    argv = [sys.executable, str(ROOT / "benchmark_refit.py"), "--dry-run", "--num-gpus", "8", *EP_REFIT.split()]
    done = subprocess.run(
        argv, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Idle ranks: 6-7 (not participating)" in done.stdout


def test_a_request_for_a_dry_run() -> None:
    line = "--model tiny --num-gpus 8 --gpus-per-node 4 --cluster h100_ib400"
    request: Request = parse([*line.split(), "--dry-run"])
    assert request.dry_run is not None
    assert (request.dry_run.num_gpus, request.dry_run.gpus_per_node) == (8, 4)
    assert request.dry_run.cluster is not None
    assert request.dry_run.cluster.inter_bytes_per_s == 50e9
    assert parse(["--model", "tiny", "--refit-method", "gloo"]).dry_run is None


def test_how_long_refits_are_repeated() -> None:
    flags = [*SMALL.split(), "--refit-method", "gloo"]
    assert parse(flags).scenario.max_iterations is None
    assert parse([*flags, "--repeat-until-stable"]).scenario.most_iterations == 200
    assert parse([*flags, "--repeat-until-stable=7"]).scenario.max_iterations == 7
    with pytest.raises(UsageError, match="ends before 6 timed refits, the fewest that an interval needs: raise it"):
        parse([*flags, "--repeat-until-stable", "5"])
    with pytest.raises(UsageError, match="ends before 9 timed refits, the fewest that --num-benchmark-iterations"):
        parse([*flags, "--repeat-until-stable=8", "--num-benchmark-iterations=9"])
