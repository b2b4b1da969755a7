"""Command lines that several tests start from, and what they mean."""

from __future__ import annotations

from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape

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
