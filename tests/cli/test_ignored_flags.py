"""Megatron-LM's flags that change no weight are accepted, those that do are not, and typos of either are caught."""

from __future__ import annotations

import argparse
import importlib.util
import re
import string
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refit.cli import ignored_flags
from refit.cli.flags import full_parser, model_parser, recorded_flags
from refit.cli.parsing import parse
from refit.cli.presets import load_preset
from refit.cli.step_flags import STEP_FLAGS
from refit.config.flag_names import SIZE_FLAGS
from refit.errors import UsageError
from refit.sweep.selection import select_file

WITH_A_VALUE = """
    adam-beta1 attention-backend attention-dropout ckpt-format clip-grad cpu-offloading-num-layers cuda-graph-impl
    data-cache-path data-parallel-sharding-strategy ddp-bucket-size distributed-timeout-minutes eval-iters exit-interval
    exp-avg-dtype fault-injector-ranks fim-rate fp8-format fp8-recipe grpo-group-size init-method-std
    inprocess-active-world-size load local-rank log-interval loss-scale lr lr-decay-style main-params-dtype min-lr
    moe-expert-capacity-factor moe-flex-dispatcher-backend moe-router-dtype moe-router-group-topk
    moe-router-score-function moe-router-topk-scaling-factor moe-token-dispatcher-type muon-tp-mode mup-base-hidden-size
    norm-epsilon num-workers optimizer pipeline-model-parallel-comm-backend recompute-num-layers
    rl-inference-model-unified-memory-level rl-prompts-per-eval rope-type rotary-base save seed split
    tensorboard-queue-size tokenizer-model vocab-file wandb-project warmup weight-decay window-size yarn-beta-fast
    """.split()  # noqa: SIM905

WITHOUT_A_VALUE = """
    accumulate-allreduce-grads-in-fp32 apply-layernorm-1p async-save batch-invariant-mode ckpt-fully-parallel-load
    cross-entropy-loss-fusion data-parallel-random-init deterministic-mode disable-fp8-wgrad disable-tp-comm-overlap-ag
    enable-experimental ep-overlap-early-attn-memory-release exit-signal-handler finetune fp32-residual-connection
    freeze-all-layers inference-disable-ep-consensus inference-dynamic-batching log-throughput manual-gc mock-data
    moe-pad-expert-input-to-capacity moe-permute-fusion moe-router-padding-for-fp8 moe-router-pre-softmax
    moe-shared-expert-overlap no-async-tensor-model-parallel-allreduce no-bias-swiglu-fusion no-load-optim
    no-rl-inference-logprobs-is-correction no-rl-partial-rollouts no-rope-fusion no-save-rng overlap-grad-reduce
    overlap-moe-expert-parallel-comm profile qk-l2-norm recompute-activations rl-inference-logprobs-is-correction
    rl-use-sequence-packing sequence-parallel sft skip-train squared-relu tp-comm-overlap use-checkpoint-args
    use-cpu-initialization use-distributed-optimizer use-flash-attn use-mcore-models use-mup use-nccl-ub
    use-rope-scaling use-te-activation-func
    """.split()  # noqa: SIM905

IN_STEPS = tuple(STEP_FLAGS)
"""Flags that a training step honours, with values that are checked. A refit alone records them all the same."""

WITH_A_VALUE = [name for name in WITH_A_VALUE if name not in IN_STEPS]
WITHOUT_A_VALUE = [name for name in WITHOUT_A_VALUE if name not in IN_STEPS]
LISTS = [name for name, sign in ignored_flags.NAMED.items() if sign == "*"]
NUMBERS = [name for name, sign in ignored_flags.NAMED.items() if sign == "#"]
SIZES = [flag for flags in SIZE_FLAGS.values() for flag in flags]

HONOURED = sorted(
    flag
    for flag, action in full_parser()._option_string_actions.items()
    if action.dest not in ignored_flags.NAMED and flag.startswith("--")
)
"""Flags that the parser honours or refuses."""


def recorded(*argv: str) -> dict[str, object]:
    """What is recorded, the same before and after another flag."""
    first, last = (
        full_parser().parse_flags(words) for words in ([*argv, "--num-layers=3"], ["--num-layers", "3", *argv])
    )
    assert first.num_layers == last.num_layers == 3
    assert recorded_flags(first) == recorded_flags(last)
    return recorded_flags(first)


def from_mapping(**values: object) -> dict[str, object]:
    """What is recorded of a preset."""
    return recorded_flags(model_parser().parse_mapping(values))


@pytest.mark.parametrize("name", WITH_A_VALUE)
@pytest.mark.parametrize("value", ["1e-5", "-1", "a,b"])
def test_a_flag_with_a_value(name: str, value: str) -> None:
    assert recorded(f"--{name}", value) == recorded(f"--{name}={value}") == {name: value}
    assert from_mapping(**{name: value}) == {name: value}
    with pytest.raises(UsageError, match="unexpected argument 'more'"):
        recorded(f"--{name}", value, "more")
    assert not full_parser().takes_list(name)


@pytest.mark.parametrize("name", WITHOUT_A_VALUE)
def test_a_flag_without_a_value(name: str) -> None:
    assert recorded(f"--{name}") == from_mapping(**{name: True}) == {name: True}
    assert from_mapping(**{name: False}) == {}


@pytest.mark.parametrize("name", LISTS)
def test_a_flag_with_a_list(name: str) -> None:
    assert recorded(f"--{name}", "a", "b") == from_mapping(**{name: ["a", "b"]}) == {name: ["a", "b"]}
    assert recorded(f"--{name}", "a") == {name: ["a"]}
    assert full_parser().takes_list(name)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_flag_with_a_number(name: str) -> None:
    assert recorded(f"--{name}", "7") == from_mapping(**{name: 7}) == {name: 7}
    with pytest.raises(UsageError, match=f"--{name}: must be at least 1, got 0"):
        recorded(f"--{name}=0")


def test_a_whole_training_command_line() -> None:
    words = [word for name in WITH_A_VALUE for word in (f"--{name}", "x")]
    words += [word for name in NUMBERS for word in (f"--{name}", "7")]
    words += [word for name in LISTS for word in (f"--{name}", "a", "b")]
    words += [f"--{name}" for name in WITHOUT_A_VALUE]
    assert recorded(*words).keys() == {*WITH_A_VALUE, *NUMBERS, *LISTS, *WITHOUT_A_VALUE}


@pytest.mark.parametrize("flag", ["--wandb-run-group", "--log-gradient-histogram", "--no-overlap-all", "--ckpt-codec"])
def test_a_flag_that_no_version_has_is_unknown_whatever_its_words(flag: str) -> None:
    for value in ([], ["2"]):
        with pytest.raises(UsageError, match=f"unknown flag {flag}: "):
            recorded(flag, *value)


def test_lists_name_each_flag_once_in_order_and_none_that_is_checked() -> None:
    files = sorted(ignored_flags.LISTS.iterdir())
    assert [file.name for file in files] == ["0.16.txt", "0.17.txt", "0.18.txt", "0.19.txt"]
    seen = {flag.removeprefix("--") for flag in full_parser()._option_string_actions}
    for file in files:
        comment, *names = file.read_text().splitlines()
        assert comment.startswith("# ")
        assert names == sorted(set(names))
        assert seen.isdisjoint(names)
        seen |= {*names}
    assert ignored_flags.LISTED.keys() <= seen


NOT_BUILT = re.compile(
    r"""(no-|disable-|enable-|use-)?
    (bert|biencoder|block-data|classes|data-per-class|data-sharding|dino|dsa|embedding-path|evidence|ict|img|iter-per|
    kitchen|linear|mamba|mask|moe-single|moe-upcycling|num-c|output-bert|patch|query-in|retriever|short-seq|swin|titles|
    grouped-gemm-for|one-sent|vision).*""",
    re.VERBOSE,
)
"""Flags of models other than those that are built, which are unknown here."""


@pytest.mark.megatron
def test_the_installed_megatron_has_no_flag_that_was_never_looked_at() -> None:
    """The wheels of Megatron-Core bring the parser from 0.17 on; 0.16 has its modules elsewhere, or not at all."""
    if importlib.util.find_spec("megatron.training") is None:
        pytest.skip("0.19 has the flags")
    if sys.version_info < (3, 12):  # which megatron.training imports `override` from
        typing.override = lambda method: method  # type: ignore[attr-defined]
    from megatron.training.arguments import add_megatron_arguments

    flags = add_megatron_arguments(argparse.ArgumentParser())._option_string_actions
    ours = full_parser()
    unknown = {flag for flag in flags if flag.startswith("--") and not ours._has(flag)}
    assert {flag for flag in unknown if not NOT_BUILT.fullmatch(flag[2:])} == set()


@pytest.mark.parametrize("name", ignored_flags.REFUSED_VALUES)
def test_a_value_that_would_change_weights_is_refused(name: str) -> None:
    neutral, reason = ignored_flags.REFUSED_VALUES[name]
    if neutral:
        assert recorded(f"--{name}", neutral) == {name: neutral}
    for parse_it in (lambda: recorded(f"--{name}", "17"), lambda: from_mapping(**{name: 17})):
        with pytest.raises(UsageError) as caught:
            parse_it()
        assert str(caught.value) == f"--{name}: 17 is not supported: {reason}"


@pytest.mark.parametrize("name", ignored_flags.REFUSED_SWITCHES)
def test_a_switch_that_would_change_weights_is_refused(name: str) -> None:
    for parse_it in (lambda: recorded(f"--{name}"), lambda: from_mapping(**{name: True})):
        with pytest.raises(UsageError) as caught:
            parse_it()
        assert str(caught.value) == f"--{name} is not supported: {ignored_flags.REFUSED_SWITCHES[name]}"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--moe-ffn-hiden-size", "--moe-ffn-hidden-size"),
        ("--rl-inference-tensor-model-parallel-sizes", "--rl-inference-tensor-model-parallel-size"),
        ("--rl-inference-tensor-model-paralel-size", "--rl-inference-tensor-model-parallel-size"),
        ("--rl-inference-decoder-first-pipeline-num-layer", "--rl-inference-decoder-first-pipeline-num-layers"),
        ("--no-position-embeddings", "--no-position-embedding"),
        ("--use-rotary-position-embedding", "--use-rotary-position-embeddings"),
        ("--fp8-param-gathr", "--fp8-param-gather"),
        ("--profile-refits", "--profile-refit"),
        ("--global-batch-sise", "--global-batch-size"),
        ("--recompute-moduls", "--recompute-modules"),
        ("--moe-token-dispatcher-typ", "--moe-token-dispatcher-type"),
    ],
)
@pytest.mark.parametrize("value", [[], ["2"]])
def test_a_typo_names_the_flag_that_was_meant(flag: str, meant: str, value: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        recorded(flag, *value)
    assert str(caught.value) == f"unknown flag {flag}: did you mean {meant}?"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--tp", "--tensor-model-parallel-size, or both layouts as text, --source 'TP2 EP4'"),
        ("--ep", "--expert-model-parallel-size, or both layouts as text, --source 'TP2 EP4'"),
        ("--iterations", "--num-benchmark-iterations"),
        ("--method", "--refit-method"),
    ],
)
def test_what_is_meant_has_an_effect(flag: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        recorded(flag, "2")
    assert str(caught.value) == f"unknown flag {flag}: did you mean {meant}?"


def test_a_note_names_what_was_recorded_and_sounds_as_if_it_were_not() -> None:
    line = "--dry-run --model tiny --refit-method nccl --warmup 10 --seq-length 4096"
    assert parse(line.split()).scenario.notes == (
        "--warmup is Megatron-LM's and recorded only, --num-benchmark-warmup is what changes this run",
    )


@pytest.mark.parametrize(
    "flag",
    """
    --moe-num-experts --moe-topk --moe-router-bias --inference-tp --inference-tensor-parallel-size --rl-world-size
    --rl-inference-tp --rl-inference-size --data-parallel-size --tokenizer-vocab-size --inference-dtype --use-fp16
    --params-dtype --fp8-param --use-rope --use-bias --no-bias --use-fsdp --use-cpu --cuda --iters --benchmark-iters
    --num-warmup --refit-timeout --transport-backend --log_interval --lr_warmup_iters
    """.split(),  # noqa: SIM905
)
def test_what_could_mean_a_size_or_a_setting_is_unknown(flag: str) -> None:
    for value in ([], ["2"]):
        with pytest.raises(UsageError, match=f"unknown flag {flag}"):
            recorded(flag, *value)


@st.composite
def typos(draw: st.DrawFn, flags: list[str]) -> str:
    """A flag with one character dropped, doubled, replaced or swapped with the next, behind the dashes."""
    flag = draw(st.sampled_from(flags))
    place = draw(st.integers(2, len(flag) - 2))
    here, following, before, after = flag[place], flag[place + 1], flag[:place], flag[place + 2 :]
    other = draw(st.sampled_from(string.ascii_lowercase + string.digits + "-_"))
    middle = draw(st.sampled_from(["", following, here * 2 + following, other + following, following + here]))
    return before + middle + after


@pytest.mark.slow
@given(typos([f"--{name}" for name in SIZES]), st.sampled_from([[], ["2"]]))
def test_no_typo_of_a_size_is_accepted(flag: str, value: list[str]) -> None:
    assume(not full_parser()._has(flag))
    with pytest.raises(UsageError, match="unknown flag"):
        full_parser().parse_flags([flag, *value])


@pytest.mark.slow
@given(typos(HONOURED))
def test_no_typo_of_any_honoured_or_refused_flag_is_accepted(flag: str) -> None:
    assume(not full_parser()._has(flag))
    for parser in (full_parser(), model_parser()):
        with pytest.raises(UsageError, match=r"unknown flag|unexpected argument"):
            parser.parse_flags([flag])


def test_a_preset_takes_no_flag_of_a_run() -> None:
    model = model_parser()._option_string_actions
    run_flags = [flag for flag in full_parser()._option_string_actions if flag.startswith("--") and flag not in model]
    assert "--profile-refit" in run_flags
    for flag in run_flags:
        with pytest.raises(UsageError, match=f"unknown flag {flag}"):
            model_parser().takes_list(flag.removeprefix("--"))


def test_presets_and_scenario_files_hold_listed_flags(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\nlr-decay-style: cosine\nuse-mup: true\n")
    assert recorded_flags(load_preset(str(preset))) == {"lr-decay-style": "cosine", "use-mup": True}
    scenarios = tmp_path / "list.yaml"
    scenarios.write_text(
        f"defaults: {{model: {preset}, refit-method: gloo, log-throughput: true}}\n"
        "scenarios: [{name: a, wandb-project: [x, y], log-throughput: false, recompute-modules: [mlp, moe]}]\n"
    )
    selection = select_file(str(scenarios), ["--adam-eps", "1e-8"])
    assert [candidate.name for candidate in selection.candidates] == ["a_x", "a_y"]
    assert parse(selection.candidates[1].flags).scenario.recorded == {
        "lr-decay-style": "cosine",
        "use-mup": True,
        "adam-eps": "1e-8",
        "wandb-project": "y",
        "recompute-modules": ["mlp", "moe"],
    }
