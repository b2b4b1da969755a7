"""Flags of FP8 destinations: what they set, what they contradict, and what a dry run then knows."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.quantisation import KEPT, Place, Quantisation
from refit.config.shape import Dtype
from refit.errors import UsageError
from refit.predict.dry_run import dry_run

TINY = ["--model", "tiny", "--refit-method", "gloo"]
BLOCK = "--rl-inference-dtype=fp8-block"
AUTOTP = ["--model=tiny_qwen3", "--kv-channels=128", "--rl-inference-format=autotp"]


def test_the_destination_alone_is_quantised() -> None:
    scenario = parse([*TINY, BLOCK]).scenario
    assert scenario.source.quantisation is None
    assert scenario.destination.quantisation == Quantisation("fp8-block", "amax", KEPT, Place.AUTO)
    assert scenario.title == "TP1 EP1 -> TP1 EP1 fp8-block"
    more = ["--rl-inference-dtype=mxfp8", "--fp8-scale-rule=ocp-floor", "--fp8-keep-bf16=embedding,output_layer,router"]
    mx = parse([*TINY, *more, "--quantise=destination"]).scenario.destination.quantisation
    assert mx == Quantisation("mxfp8", "ocp-floor", ("embedding", "output_layer", "router"), Place.DESTINATION)


def test_bf16_is_a_cast_of_other_sources() -> None:
    scenario = parse([*TINY, "--fp32", "--rl-inference-dtype=bf16"]).scenario
    assert (scenario.source.dtype, scenario.destination.dtype) == (Dtype.FP32, Dtype.BF16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fp8-scale-rule=amax"], "--fp8-scale-rule needs --rl-inference-dtype fp8-block or mxfp8"),
        (["--quantise=source", "--rl-inference-dtype=bf16"], "--quantise needs --rl-inference-dtype fp8-block"),
        (["--fp8-keep-bf16=router"], "--fp8-keep-bf16 needs"),
        ([BLOCK, "--fp8-scale-rule=ceil"], "ceil is a rule of mxfp8: fp8-block has amax, amax-inverse, pow2"),
        (["--rl-inference-dtype=mxfp8", "--fp8-scale-rule=pow2"], "pow2 is a rule of fp8-block: mxfp8 has ceil, ocp"),
        ([BLOCK, "--fp16"], "fp8-block quantises BF16 weights, the source has float16"),
        ([BLOCK, "--measure=forward"], "--rl-inference-dtype fp8-block needs a refit: forward passes run on deq"),
        ([BLOCK, "--measure=train-step"], "--rl-inference-dtype is for the destination"),
        ([BLOCK, "--refit-engine=nccl-m2n"], "--refit-engine nccl-m2n cannot refit to fp8-block"),
        (
            [*AUTOTP, BLOCK, "--rl-inference-tensor-model-parallel-size=4"],
            r"destination: rank \d+ holds 192 rows of \S*linear_fc1.weight from 0 on, .* blocks of 128",
        ),
        ([BLOCK, "--refit-engine=megatron"], "--refit-engine megatron cannot refit to fp8-block"),
        (
            [BLOCK, "--rl-inference-tensor-model-parallel-size=4"],
            r"destination: rank \d+ holds 64 columns of decoder.layers.0.self_attention.linear_proj.weight.*of 128",
        ),
        (["--rl-inference-dtype=mxfp8", "--moe-ffn-hidden-size=100"], "100 columns of .*experts.* blocks of 32"),
        ([BLOCK, "--fp8-keep-bf16=norm"], "embedding.word_embeddings.weight is padded"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse([*TINY, *flags])
    assert "\n" not in str(error.value)


def test_a_model_provider_chooses_the_dtype() -> None:
    with pytest.raises(UsageError, match="--rl-inference-dtype fp8-block contradicts --model-provider"):
        parse(["--model-provider=a:b", "--refit-method=gloo", BLOCK])


def test_a_dry_run_counts_codes_scales_and_memory_to_quantise() -> None:
    flags = ["--dry-run", "--model=kimi_k2", "--expert-model-parallel-size=64", "--source-world-size=64"]
    flags += ["--rl-inference-tensor-model-parallel-size=8", "--rl-inference-expert-model-parallel-size=16"]
    flags += ["--transformer-impl=transformer_engine"]
    plain, quantised, late = (
        dry_run(request.scenario, request.dry_run)
        for request in (parse([*flags, *more]) for more in ([], [BLOCK], [BLOCK, "--quantise=destination"]))
        if request.dry_run is not None
    )
    held = max(quantised.destination_bytes.values()) / max(plain.destination_bytes.values())
    assert 0.5 < held < 0.53
    assert max(quantised.source_bytes.values()) == max(plain.source_bytes.values())
    assert quantised.cost.wire_bytes < 0.53 * plain.cost.wire_bytes
    assert late.cost.wire_bytes == plain.cost.wire_bytes
    assert plain.encoding_bytes == {}
    assert set(quantised.encoding_bytes) <= set(range(64))
    assert set(late.encoding_bytes) == set(range(64, 192))
    assert max(quantised.encoding_bytes.values()) <= 0.53 * max(quantised.source_bytes.values())
    assert sum(late.encoding_bytes.values()) < late.cost.wire_bytes
    assert [quantised.held_text(side) for side in ("source", "destination")] == ["weights and quantising", "weights"]
    assert [late.held_text(side) for side in ("source", "destination")] == ["weights", "weights and quantising"]
    assert quantised.memory_bytes > plain.memory_bytes, "a source, here the fuller side, keeps codes and scales"
