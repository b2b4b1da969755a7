"""Flags of steps: honoured where a step is measured, else recorded; Megatron's rules before anything is built."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.scenario import Mode, Scenario
from refit.config.steps import Dispatch, Recompute
from refit.errors import UsageError

BASE = ["--model", "tiny", "--refit-method", "gloo"]
TRAIN = [*BASE, "--measure", "train-step", "--expert-model-parallel-size", "2"]
STAGES = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
OVERLAP = ["--overlap-moe-expert-parallel-comm", "--moe-token-dispatcher-type", "alltoall"]


def scenario(*argv: str) -> Scenario:
    return parse(argv).scenario


def test_a_refit_only_records_them() -> None:
    found = scenario(
        *BASE, "--seq-length", "512", "--sequence-parallel", "--recompute-modules", "moe", "mlp", "--lr", "1"
    )
    assert found.steps is None
    assert found.recorded == {
        "seq-length": 512,
        "sequence-parallel": True,
        "recompute-modules": ["moe", "mlp"],
        "lr": 1.0,
    }


def test_a_step_honours_them() -> None:
    found = scenario(
        *TRAIN, *STAGES, *OVERLAP, "--micro-batch-size", "2", "--global-batch-size", "16", "--seq-length", "64",
        "--num-train-steps", "20", "--num-train-warmup", "4", "--lr", "3e-4", "--seed", "7", "--delay-wgrad-compute",
        "--recompute-activations", "--moe-router-force-load-balancing", "--moe-router-dtype", "fp32",
    )  # fmt: skip
    steps = found.steps
    assert steps is not None
    assert found.recorded == {}
    assert (steps.micro_batch_size, steps.global_batch_size, steps.seq_length) == (2, 16, 64)
    assert (steps.num_steps, steps.num_warmup, steps.lr, steps.seed) == (20, 4, 3e-4, 7)
    assert steps.recompute == Recompute("selective", modules=("core_attn",))
    assert steps.dispatch == Dispatch("alltoall", None, True, True, True, "fp32")
    assert steps.num_microbatches(found.source.layout.dp) == 4


def test_measurements_come_in_the_order_of_the_cycle() -> None:
    assert scenario(*BASE, "--measure", "forward,refit,train-step").measurements == ("train-step", "refit", "forward")
    assert scenario(*BASE).measurements == ("refit",)


def test_a_training_step_alone_needs_the_ranks_of_the_source_alone() -> None:
    found = scenario(*TRAIN)
    assert found.used_sides == ("source",)
    assert found.num_ranks == 2
    assert found.mode is Mode.COLLOCATED
    with pytest.raises(UsageError, match="--rl-inference-tensor-model-parallel-size is for the destination"):
        scenario(*TRAIN, "--rl-inference-tensor-model-parallel-size", "2")


def test_a_side_that_is_not_trained_runs_without_what_a_backward_pass_has() -> None:
    flags = [*TRAIN, *STAGES, *OVERLAP, "--recompute-activations", "--seq-length", "64"]
    flags[flags.index("train-step")] = "train-step,refit,forward"
    found = scenario(*flags)
    source, destination = found.steps_of("source"), found.steps_of("destination")
    assert source is not None
    assert destination is not None
    assert source.dispatch.overlap
    assert not destination.dispatch.overlap
    assert destination.recompute == Recompute()
    assert destination.dispatch.dispatcher == "alltoall"


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--global-batch-size", "7"], r"--global-batch-size 7 is not divisible by micro-batch 1 x DP 2.*calculator"),
        ([*STAGES, "--global-batch-size", "6"], r"3 micro-batches are not divisible by PP 2.*interleaved"),
        (["--seq-length", "4096"], "more than the 512 positions.*Megatron-LM"),
        (["--tensor-model-parallel-size", "2"], "under sequence parallelism only.*MoELayer.*--sequence-parallel"),
        (
            ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "33"],
            "33 is not divisible by TP 2",
        ),
        (["--moe-flex-dispatcher-backend", "deepep"], "is for --moe-token-dispatcher-type flex"),
        (["--moe-token-dispatcher-type", "flex"], "float32 probabilities only.*--moe-router-dtype fp32"),
        (["--recompute-granularity", "full"], "needs --recompute-method and --recompute-num-layers"),
        (["--recompute-method", "uniform"], "are for --recompute-granularity full"),
        (["--recompute-granularity", "selective", "--recompute-modules", "all"], "all is not one of core_attn"),
        (["--recompute-granularity", "selective", "--recompute-modules", "mla_up_proj"], "multi-latent"),
        (["--recompute-modules", "mlp"], "for --recompute-granularity selective"),
        (["--delay-wgrad-compute"], "needs --overlap-moe-expert-parallel-comm .*TransformerConfig"),
        (["--overlap-moe-expert-parallel-comm"], "needs the dispatcher alltoall or flex .*TransformerConfig"),
        ([*OVERLAP, "--pipeline-model-parallel-size", "2"], "needs virtual pipeline stages .*TransformerConfig"),
        ([*OVERLAP, "--fp32"], "needs bf16 or fp16"),
        (
            [*OVERLAP, "--recompute-granularity", "selective", "--recompute-modules", "moe"],
            "neither full recomputation",
        ),
        (["--fp8-format", "e4m3"], "--fp8-format may change a step"),
        (["--moe-expert-capacity-factor", "1.0"], "--moe-expert-capacity-factor may change a step"),
        (["--attention-dropout", "0.1"], "attention-dropout 0.1 is not built .* run with 0"),
        (["--moe-router-load-balancing-type", "aux_loss"], "run with none"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_rules_are_checked_before_anything_is_built(flags: list[str], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        scenario(*TRAIN, "--seq-length", "64", *flags)


FULL = ["--recompute-granularity=full"]


@pytest.mark.parametrize("library", ["fsdp2", "autotp"])
@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--global-batch-size=3"], "--global-batch-size 3 is not divisible by micro-batch 1 x DP 2 = 2: give a mul"),
        (["--seq-length=1024"], "--seq-length 1024 is more than the 512 positions"),
        (["--sequence-parallel"], "--sequence-parallel is Megatron-Core's"),
        (["--recompute-activations"], "whole layers again, no single modules"),
        (["--recompute-granularity=full"], "needs --recompute-method and --recompute-num-layers"),
        (["--recompute-method=uniform"], "are for --recompute-granularity full"),
        ([*FULL, "--recompute-method=uniform", "--recompute-num-layers=2"], "units of 2 are Megatron-Core's"),
        (["--moe-token-dispatcher-type=alltoall"], "no token dispatcher of Megatron-Core"),
    ],
)
def test_rules_of_transformers_sides(library: str, flags: list[str], rule: str) -> None:
    dense = ["--model=tiny_qwen3", "--refit-method=gloo", "--measure=train-step", "--source-world-size=4"]
    dense += ["--tensor-model-parallel-size=2", f"--source-format={library}"]
    steps = scenario(*dense, "--micro-batch-size=2", "--global-batch-size=8").steps
    assert steps is not None
    assert steps.num_microbatches(2) == 2
    with pytest.raises(UsageError, match=f"source: .*{rule}"):
        scenario(*dense, *flags)


@pytest.mark.parametrize("text", ["0", "0.5", "3", "8589934592", "x"])
def test_a_loss_scale_is_a_power_of_two(text: str) -> None:
    with pytest.raises(UsageError, match=r"--initial-loss-scale: .*(power of two from 1 to 4294967296|a number)"):
        scenario(*TRAIN, "--seq-length=64", f"--initial-loss-scale={text}")
    steps = scenario(*TRAIN, "--seq-length=64", "--initial-loss-scale=1024").steps
    assert steps is not None
    assert steps.initial_loss_scale == 1024


def test_deepspeeds_16_bit_optimizer_is_not_trained() -> None:
    flags = ["--model=tiny_qwen3", "--refit-method=gloo", "--measure=train-step", "--source-format=autotp"]
    with pytest.raises(UsageError, match=r"ZeRO stage 0 trains in 32 bit only.*--zero-stage 1"):
        scenario(*flags, "--zero-stage=0")
    assert scenario(*flags, "--zero-stage=0", "--fp32").steps is not None
    with pytest.raises(UsageError, match=r"ZeRO stage 0 trains with TP 1 only here, TP 2 gives.*--zero-stage 1"):
        scenario(*flags, "--zero-stage=0", "--fp32", "--tensor-model-parallel-size=2")


@pytest.mark.parametrize("flag", [["--expert-model-parallel-size", "1"], []])
def test_deepep_needs_several_ranks(flag: list[str]) -> None:
    flags = [*TRAIN, "--seq-length", "64", "--moe-token-dispatcher-type", "flex", "--moe-router-dtype", "fp32", *flag]
    if not flag:
        assert scenario(*flags).steps.dispatch.arm == "flex/deepep"  # type: ignore[union-attr]
        return
    with pytest.raises(UsageError, match="TPxEP > 1"):
        scenario(*flags)


NCCL_EP = ["--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "ncclep"]
ROOM = ["--moe-expert-rank-capacity-factor", "1.5"]


def test_nccl_ep_has_room_for_some_tokens() -> None:
    steps = scenario(*TRAIN, "--seq-length", "64", *NCCL_EP, *ROOM).steps
    assert steps is not None
    assert (steps.dispatch.arm, steps.dispatch.rank_capacity) == ("flex/ncclep", 1.5)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (NCCL_EP, r"needs --moe-expert-rank-capacity-factor.*_NCCLEPManager.*give 1\.5"),
        ([*NCCL_EP, "--moe-expert-rank-capacity-factor", "0.9"], r"must be from 1 to 1000, got 0\.9"),
        ([*NCCL_EP, *ROOM, "--measure", "train-step,refit"], r"set up once per process.*--measure train-step$"),
        ([*NCCL_EP, *ROOM, "--measure", "forward"], r"set up once per process"),
        (["--moe-token-dispatcher-type", "alltoall", *ROOM], "ncclep only, others would drop tokens"),
    ],
)
def test_the_rules_of_nccl_ep_are_named(flags: list[str], rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        scenario(*TRAIN, "--seq-length", "64", *flags)


def test_flags_of_logs_and_checkpoints_change_no_step() -> None:
    found = scenario(
        *TRAIN, "--seq-length", "64", "--wandb-project", "x", "--save-interval", "5", "--attention-dropout", "0.0"
    )
    assert found.recorded == {"wandb-project": "x", "save-interval": "5", "attention-dropout": "0.0"}


def test_a_provider_has_no_known_shape() -> None:
    with pytest.raises(UsageError, match="--model-provider has none"):
        scenario("--model-provider", "a:b", "--refit-method", "gloo", "--measure", "train-step")


def test_unknown_measurements_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'train'.*train-step"):
        scenario(*BASE, "--measure", "refit,train")
