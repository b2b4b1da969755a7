"""Command lines that are refused: one line of error and exit code 2."""

from __future__ import annotations

import pytest

from refit.cli.main import main
from refit.config.registry import ENGINES
from refit.config.rows import Engine
from refit.errors import UsageError
from tests.cli.lines import TWO_HEADS, TWO_STAGES, scenario

REFUSED_FLAGS = [
    ("--num-layers 0", "--num-layers: must be at least 1, got 0"),
    ("--hidden-size -64", "--hidden-size: must be at least 1, got -64"),
    ("--hidden-size=6.4", "--hidden-size: expected a whole number, got '6.4'"),
    ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size: must be at least 1, got 0"),
    ("--seq-length -1", "--seq-length: must be at least 1, got -1"),
    ("--num-experts 0", "--num-experts: must be at least 1, got 0"),
    ("--num-benchmark-iterations 0", "--num-benchmark-iterations: must be at least 1, got 0"),
    ("--num-benchmark-warmup -1", "--num-benchmark-warmup: must be at least 0, got -1"),
    ("--refit-method shm --device cuda", "--refit-method shm moves weights on cpu only: leave --device cuda"),
    ("--refit-method shm --ranks-per-gpu 2", "places ranks on GPUs, and these are on CPUs: leave it"),
    (
        "--refit-method gloo --ranks-per-gpu 2",
        "and these are on CPUs: give --device cuda",
    ),
    ("--refit-method auto --device cpu --ranks-per-gpu 2", "and these are on CPUs: leave it out"),
    ("--ranks-per-gpu 0", "--ranks-per-gpu: must be at least 1, got 0"),
    ("--timeout 0", "--timeout: must be a positive number of seconds, got 0"),
    ("--timeout nan", "--timeout: must be a positive number of seconds, got nan"),
    ("--num-layers", "--num-layers: expected one argument"),
    ("--tensor-model-parallel-size 3", "source: 4 attention heads cannot be divided by TP size 3"),
    ("--num-experts 6 --expert-model-parallel-size 4", "6 experts cannot be divided by EP size 4"),
    ("--expert-model-parallel-size 2", "EP size 2 needs experts"),
    ("--rl-inference-pipeline-model-parallel-size 3", "2 layers do not divide by pipeline size 3"),
    ("--num-attention-heads 5", "hidden size 64 cannot be divided by 5 attention heads"),
    ("--num-query-groups 3", "4 attention heads cannot be divided by 3 query groups"),
    ("--padded-vocab-size 1001 --tensor-model-parallel-size 2", "1001 cannot be divided by TP size 2"),
    ("--padded-vocab-size 512 --vocab-size 500", "--vocab-size contradicts --padded-vocab-size"),
    ("--source-world-size 3 --tensor-model-parallel-size 2", "source: 3 ranks cannot be divided into TP x PP"),
    ("--num-experts 4 --expert-tensor-parallel-size 2 --source-world-size 1", "ETP x EP x PP = 2"),
    ("--decoder-first-pipeline-num-layers 1", "there is one stage: raise PP"),
    ("--bf16 --fp16", "--fp16: not allowed with argument --bf16"),
    ("--q-lora-rank 8", "--q-lora-rank needs --multi-latent-attention"),
    ("--qk-head-dim 8", "--qk-head-dim needs --multi-latent-attention"),
    ("--multi-latent-attention --num-query-groups 2", "--num-query-groups contradicts --multi-latent-attention"),
    ("--moe-ffn-hidden-size 8", "--moe-ffn-hidden-size needs --num-experts"),
    ("--moe-grouped-gemm", "--moe-grouped-gemm needs --num-experts"),
    ("--num-experts 4 --moe-router-topk 5", "--moe-router-topk 5 is more than the 4 experts"),
    ("--num-experts 4 --moe-layer-freq [0,1,1]", "--moe-layer-freq lists 3 layers, the model has 2"),
    ("--num-experts 4 --moe-layer-freq [2,1]", "expected a number or a list of 0 and 1"),
    ("--num-experts 4 --moe-layer-freq [exit()]", "expected a number or a list of 0 and 1"),
    ("--num-experts 4 --moe-layer-freq [0]*99999*99999", "expected a number or a list of 0 and 1"),
    ("--hiden-size 64", "unknown flag --hiden-size: did you mean --hidden-size?"),
    ("--num-layer=2", "unknown flag --num-layer: did you mean --num-layers?"),
    ("--tensor-parallel 2", "unknown flag --tensor-parallel"),
    ("--moe-ffn-hiden-size 8", "unknown flag --moe-ffn-hiden-size: did you mean --moe-ffn-hidden-size?"),
    ("--log-interval 5 6", "unexpected argument '6'"),
    ("--zzz", "unknown flag --zzz: no known flag is close to it"),
    ("7", "unexpected argument '7'"),
    ("--refit-method smoke", "--refit-method: invalid choice: 'smoke'"),
    ("--refit-mode both", "--refit-mode: invalid choice: 'both'"),
    (
        "--refit-engine refit,rfit",
        "--refit-engine: invalid choice: 'rfit' (choose from refit, megatron, nccl-m2n, vllm-reload, vllm-ipc, "
        "checkpoint-engine, full, both)",
    ),
    ("--position-embedding-type alibi", "--position-embedding-type: invalid choice: 'alibi'"),
    ("--context-parallel-size 2", "--context-parallel-size: 2 is not supported"),
    ("--mtp-num-layers 1", "1 multi-token prediction layers need --position-embedding-type rope or none"),
    (
        "--mtp-num-layers 1 --position-embedding-type rope --rl-inference-pipeline-model-parallel-size 2",
        "destination: Megatron cannot tie the output layer to the embedding with 1 multi-token prediction layers on PP "
        "size 2",
    ),
    ("--mtp-num-layers 1001", "--mtp-num-layers: must be at most 1,000"),
    ("--moe-latent-size 8", "--moe-latent-size needs --num-experts"),
    (
        "--num-virtual-stages-per-pipeline-rank 2",
        "source: 2 virtual pipeline stages per rank need more than one pipeline stage, PP size is 1",
    ),
    ("--moe-shared-expert-gate", "--moe-shared-expert-gate needs --num-experts"),
]
"""Flags that are refused beside those of a small model, TWO_HEADS."""

REFUSED_LINES = [
    *((f"{TWO_HEADS} {flags}", message) for flags, message in REFUSED_FLAGS),
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


@pytest.mark.parametrize(("line", "message"), REFUSED_LINES)
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


def test_an_engine_that_cannot_refit_a_sides_format_is_refused() -> None:
    row = Engine(engine="nowhere:Nothing", title="Picky", formats=("fsdp2",))
    with (
        ENGINES.added("picky", row),
        pytest.raises(UsageError, match="--refit-engine picky refits fsdp2 sides only, one side is megatron"),
    ):
        scenario(f"{TWO_HEADS} --refit-engine refit,picky")
