"""--attn-impl and --autocast: which sides have them, what they make of the dtypes, and what is refused."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.config.shape import Dtype
from refit.errors import UsageError

BASE = ["--model=tiny_qwen3", "--refit-method=gloo"]
LIBRARIES = ["fsdp2", "autotp"]


def scenario(*flags: str) -> Scenario:
    return parse([*BASE, *flags]).scenario


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_sides_of_transformers_have_the_attention(library: str) -> None:
    found = scenario(f"--source-format={library}", "--rl-inference-format=fsdp2", "--attn-impl=eager")
    assert [side.attn_impl for side in found.sides.values()] == ["eager", "eager"]
    found = scenario(f"--source-format={library}")
    assert [side.attn_impl for side in found.sides.values()] == ["sdpa", None]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP16])
def test_autocast_is_of_the_source_alone(library: str, dtype: Dtype) -> None:
    """What is refitted arrives in the dtype that was given, as without autocast."""
    flags = [f"--source-format={library}", "--rl-inference-format=fsdp2", *(["--fp16"] if dtype is Dtype.FP16 else [])]
    found = scenario(*flags, "--autocast")
    assert (found.source.dtype, found.source.autocast, found.source.compute_dtype) == (Dtype.FP32, dtype, dtype)
    assert found.destination == scenario(*flags).destination
    assert found.source.title.endswith(" autocast")
    assert scenario(*flags).source.compute_dtype is dtype


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--attn-impl=eager"],
            "--attn-impl eager is for models of transformers .fsdp2 and autotp.*--transformer-impl",
        ),
        (["--attn-impl=sdpa", "--rl-inference-format=vllm"], "here are megatron and vllm sides"),
        (["--attn-impl=sdpa", "--measure=train-step", "--rl-inference-format=fsdp2"], "here are megatron sides"),
        (["--autocast"], "--autocast is for sources of transformers .*, the source is megatron.*Megatron-Core has"),
        (["--autocast", "--rl-inference-format=fsdp2"], "the source is megatron"),
        (["--source-format=fsdp2", "--autocast", "--fp32"], "--autocast computes in 16 bits: give --bf16 or --fp16"),
        (
            ["--source-format=autotp", "--attn-impl=flash_attention_2", "--fp32"],
            "flash_attention_2 computes in 16 bits",
        ),
        (["--source-format=fsdp2", "--autocast", "--rl-inference-dtype=fp8-block"], "quantises BF16 weights, with --a"),
        (
            ["--source-format=autotp", "--autocast", "--fp16", "--measure=train-step"],
            "source: DeepSpeed clips gradients of --autocast with --fp16.*give --bf16",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        scenario(*flags)
    assert "\n" not in str(refused.value)


def test_flash_attention_takes_weights_of_autocast() -> None:
    """They are float32, and queries are not."""
    found = scenario("--source-format=fsdp2", "--attn-impl=flash_attention_2", "--autocast")
    assert found.source.attn_impl == "flash_attention_2"
