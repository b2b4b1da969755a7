"""Formats of the sides on the command line, their own flags, and libraries that are not installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from refit.bench.runner import run
from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.errors import ExitCode, UnavailableError, UsageError
from refit.predict.dry_run import dry_run
from refit.predict.fsdp2 import Fsdp2Options
from refit.report.plans.rank_map import rank_map

MOE = ["--model", "tiny_qwen3_moe", "--refit-method", "gloo"]
FSDP2 = [*MOE, "--source-format=fsdp2", "--source-world-size=4", "--tensor-model-parallel-size=2"]


def test_sides_have_a_format_each() -> None:
    scenario = parse(FSDP2).scenario
    assert (scenario.source.format, scenario.destination.format) == ("fsdp2", "megatron")
    assert scenario.source.layout == Layout(tp=2, ep=1, etp=1, pp=1, world_size=4)
    assert scenario.destination.layout == Layout(tp=2, ep=1, etp=2, pp=1, world_size=2, first_rank=4)
    assert scenario.title == "fsdp2 TP2 EP1 FSDP2 -> TP2 EP1"
    assert "Source ranks: 0-3 (fsdp2 TP2 EP1 FSDP2)" in rank_map(scenario, 6)


def test_a_format_takes_its_own_flags_and_sizes() -> None:
    flags = ["--rl-inference-format=fsdp2", "--rl-inference-fsdp-replicate-size=2", "--destination-world-size=4"]
    scenario = parse([*MOE, *flags, "--pipeline-model-parallel-size=2"]).scenario
    assert scenario.source.options is None
    assert scenario.destination.options == Fsdp2Options(replicate_size=2)
    assert scenario.destination.layout.pp == 1, "the source's pipeline stages are not inherited"
    assert scenario.destination.title == "fsdp2 TP1 EP1 FSDP2 HSDP2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source-format", "gguf"], "invalid choice: 'gguf'"),
        (["--fsdp-replicate-size=2"], "--fsdp-replicate-size needs --source-format fsdp2, the source is megatron"),
        (
            [*FSDP2, "--pipeline-model-parallel-size=2"],
            "--pipeline-model-parallel-size 2: fsdp2 sides have tp, ep only",
        ),
        (
            [*FSDP2, "--expert-tensor-parallel-size=2"],
            "--expert-tensor-parallel-size 2: fsdp2 sides have tp, ep only",
        ),
        ([*FSDP2, "--source-world-size=5"], "source: 5 ranks cannot be divided into TP x PP = 2"),
        ([*FSDP2, "--fsdp-replicate-size=3"], "source: 4 ranks cannot be divided into HSDP replicas x TP = 3 x 2 = 6"),
        ([*FSDP2, "--refit-engine=megatron"], "--refit-engine megatron refits megatron sides only, one side is fsdp2"),
        (
            [*FSDP2, "--rl-inference-format=vllm", "--transformer-impl=transformer_engine"],
            "--transformer-impl transformer_engine chooses .* Megatron-Core sides, here are fsdp2 and vllm sides: ",
        ),
        (
            [*FSDP2, "--measure=train-step", "--transformer-impl=local"],
            "--transformer-impl local .*, here are fsdp2 sides",
        ),
        (
            ["--refit-method=gloo", "--source-format=fsdp2", "--model-provider=examples.custom_model:build"],
            "--model-provider builds a Megatron-Core model, one side is fsdp2",
        ),
    ],
)
def test_what_cannot_be_honoured_is_one_line(flags: list[str], message: str) -> None:
    provider = any("provider" in flag for flag in flags)
    with pytest.raises(UsageError, match=message) as error:
        parse(flags if provider else [*MOE, *flags])
    assert error.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [["--rl-inference-format=vllm"], FSDP2], ids=["source", "destination"])
def test_one_megatron_side_takes_its_layers(flags: list[str]) -> None:
    found = parse([*MOE, *flags, "--transformer-impl=transformer_engine"]).scenario
    assert "megatron" in {side.format for side in found.sides.values()}
    assert {side.transformer_impl for side in found.sides.values()} == {"transformer_engine"}


@pytest.mark.parametrize(
    ("side", "library", "extra"), [("fsdp2", "transformers", "hf"), ("autotp", "deepspeed", "autotp")]
)
def test_a_missing_library_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, side: str, library: str, extra: str
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == library else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    command = rf"{library}, which is not installed: pip install .*\[{extra}\]"
    with pytest.raises(UnavailableError, match=command) as error:
        run(parse([*MOE, f"--source-format={side}"]).scenario)
    assert error.value.exit_code == ExitCode.WAIVED


@pytest.mark.parametrize("model", ["tiny_qwen3", "tiny_qwen3_moe", "tiny_deepseek_v3"])
def test_a_dry_run_plans_both_directions(model: str) -> None:
    """Each element that a Megatron side of one rank holds comes from one FSDP2 rank; and into AutoTP."""
    for flags in (["--source-format=fsdp2", "--source-world-size=3"], ["--rl-inference-format=autotp"]):
        request = parse(["--dry-run", "--model", model, *flags])
        assert request.dry_run is not None
        planned = dry_run(request.scenario, request.dry_run)
        assert planned.cost.payload_bytes == sum(planned.destination_bytes.values())
