"""What an error says to do works: each command line is refused, its error's remedy is applied, and it plans."""

from __future__ import annotations

import re

import pytest

from refit.cli.parsing import parse
from refit.config.quantisation import KEPT
from refit.errors import UsageError
from refit.predict.dry_run import dry_run
from tests.cli.lines import TWO_HEADS, TWO_STAGES

DENSE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --qk-layernorm --ffn-hidden-size 128 --vocab-size 512"
)
MOE = f"{DENSE} --num-experts 8 --moe-ffn-hidden-size 32"
MLA = f"{DENSE} --multi-latent-attention --kv-lora-rank 16"
VLLM, FSDP2, AUTOTP = (f"--rl-inference-format {name}" for name in ("vllm", "fsdp2", "autotp"))
LATENT_PIPE = "--model tiny_deepseek_v3 --rl-inference-pipeline-model-parallel-size 1"
FP8 = "--model tiny_qwen3 --rl-inference-dtype fp8-block"

REMEDIES = [
    # A model that a format has no names for.
    (f"--model deepseek_v3 {VLLM}", "give --mtp-num-layers 0"),
    (f"--model deepseek_v3 {FSDP2}", "give --mtp-num-layers 0"),
    (f"--model tiny {VLLM}", "give --moe-router-enable-expert-bias"),
    (f"{MOE} --moe-router-enable-expert-bias {VLLM}", "give --moe-shared-expert-intermediate-size 32"),
    (f"{MOE} --moe-shared-expert-intermediate-size 32 {VLLM}", "leave --moe-shared-expert-intermediate-size out"),
    (f"{MOE} --moe-latent-size 32 {VLLM}", "leave --moe-latent-size out"),
    (f"{DENSE} --add-qkv-bias {VLLM}", "leave --add-qkv-bias out"),
    (
        f"{TWO_HEADS} --rl-inference-format autotp",
        "give --position-embedding-type rope, give --normalization RMSNorm, give --swiglu, give --disable-bias-linear",
    ),
    (
        f"{MLA} {VLLM}",
        "give --num-experts 8, give --moe-shared-expert-intermediate-size 128, give --moe-router-enable-expert-bias",
    ),
    (
        f"{MLA} --num-experts 4 --moe-ffn-hidden-size 32 --moe-router-enable-expert-bias {FSDP2}",
        "give --moe-shared-expert-intermediate-size 32",
    ),
    # Positions.
    (f"{TWO_HEADS} --no-position-embedding", "--position-embedding-type rope"),
    (f"{MOE} --no-position-embedding --position-embedding-type none", "--position-embedding-type rope"),
    (f"{TWO_HEADS} --mtp-num-layers 1", "--position-embedding-type rope"),
    # Pipelines.
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttmL",
        "give --mtp-num-layers 1",
    ),
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tttL --mtp-num-layers 1",
        "give --mtp-num-layers 0",
    ),
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-layout Et|t|t|tL --num-virtual-stages-per-pipeline-rank 2",
        "give --pipeline-model-parallel-size 2",
    ),
    (f"{LATENT_PIPE} --pipeline-model-parallel-layout Et|t|t|tL", "give --pipeline-model-parallel-size 4"),
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Et|t|t|tL",
        "give --pipeline-model-parallel-size 4",
    ),
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et|t|t|tL "
        "--num-virtual-stages-per-pipeline-rank 2",
        "leave --num-virtual-stages-per-pipeline-rank out",
    ),
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et|t|t|tL "
        "--decoder-first-pipeline-num-layers 2",
        "leave --decoder-first-pipeline-num-layers out",
    ),
    (
        f"{LATENT_PIPE} --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et|t|t|tL "
        "--num-layers-per-virtual-pipeline-stage 2",
        "leave --num-layers-per-virtual-pipeline-stage out",
    ),
    (
        f"{TWO_STAGES} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--num-virtual-stages-per-pipeline-rank 2",
        "leave --num-layers-per-virtual-pipeline-stage out",
    ),
    (
        f"--model tiny_qwen3 --rl-inference-pipeline-model-parallel-layout Et*4L {FSDP2}",
        "leave --rl-inference-pipeline-model-parallel-layout out",
    ),
    (
        f"{TWO_HEADS} --position-embedding-type rope --mtp-num-layers 1 --rl-inference-pipeline-model-parallel-size 2",
        "give --untie-embeddings-and-output-weights",
    ),
    # Sizes that a format has not.
    (
        f"--model tiny_qwen3 --rl-inference-pipeline-model-parallel-size 2 {FSDP2}",
        "leave --rl-inference-pipeline-model-parallel-size out",
    ),
    (
        f"--model tiny_qwen3_moe --rl-inference-expert-tensor-model-parallel-size 2 {VLLM}",
        "leave --rl-inference-expert-tensor-model-parallel-size out",
    ),
    (f"{TWO_HEADS} --expert-model-parallel-size 2", "--expert-model-parallel-size 1"),
    (f"{TWO_HEADS} --num-experts 4 --moe-router-topk 5", "give --moe-router-topk 4"),
    # FP8.
    (f"{FP8} --fp8-keep-bf16 norm", "--fp8-keep-bf16 norm,word_embeddings"),
    (
        f"{FP8} --hidden-size 192 --ffn-hidden-size 192 --tensor-model-parallel-size 2",
        f"--fp8-keep-bf16 {','.join(KEPT)},linear_fc1,linear_fc2",
    ),
    (f"{FP8} --fp8-keep-bf16 embedding,linear,nomatch", "leave nomatch out"),
]


def applied(words: list[str], remedy: str) -> list[str]:
    """The command line with what the remedy says given or left out."""
    for step in remedy.split(", "):
        if left := re.fullmatch(r"leave (\S+) out", step):
            words = _without(words, left[1])
        else:
            flag, *values = step.removeprefix("give ").removeprefix("choose ").split()
            words = [*_without(words, flag), flag, *values]
    return words


def _without(words: list[str], flag: str) -> list[str]:
    if not flag.startswith("--"):
        return [",".join(part for part in word.split(",") if part != flag) for word in words]
    if flag not in words:
        return words
    at = words.index(flag)
    end = next((place for place in range(at + 1, len(words)) if words[place].startswith("--")), len(words))
    return words[:at] + words[end:]


@pytest.mark.parametrize(("line", "remedy"), REMEDIES, ids=[line for line, _ in REMEDIES])
def test_a_remedy_works(line: str, remedy: str) -> None:
    words = ["--dry-run", *line.split()]
    with pytest.raises(UsageError) as refused:
        parse(words)
    assert remedy in str(refused.value)
    request = parse(applied(words, remedy))
    assert request.dry_run is not None
    if request.scenario.model is not None and request.scenario.model.hidden_size < 1024:
        dry_run(request.scenario, request.dry_run)
