"""A layout that a title or a table prints can be typed: `--source TEXT` and `--destination TEXT` read it."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.side import SideSpec
from refit.errors import UsageError


def sides(line: str, *layouts: str) -> tuple[SideSpec, SideSpec]:
    scenario = parse(["--dry-run", *line.split(), *layouts]).scenario
    return scenario.source, scenario.destination


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("TP2 EP4", "TP4 EP2"),
        ("TP2 EP4 ETP1", "TP4 EP1 PP2"),
        ("TP2 EP1 PP2 VPP2", "TP1 EP1"),
        ("fsdp2 TP2 EP1 FSDP2", "vllm TP2 EP1"),
        ("fsdp2 TP1 EP2 FSDP4 HSDP2", "vllm TP2 DP2 EP4"),
        ("autotp TP2 DP2 ZeRO1", "vllm TP1 DP8 EP8 +8 x2"),
        ("autotp TP2 DP1 ZeRO0", "autotp TP4 DP2"),
        ("TP1 EP2", "vllm TP2 EP2 PP2 x2"),
    ],
)
def test_what_is_printed_of_a_side_can_be_typed(source: str, destination: str) -> None:
    both = sides("--model tiny_qwen3_moe --num-layers 4", "--source", source, "--destination", destination)
    assert [side.title for side in both] == [source, destination]


def test_sizes_of_a_text_are_its_own_and_letters_may_be_small() -> None:
    source, destination = sides("--model tiny", "--source", "tp2 ep2", "--destination", "TP2")
    assert (source.layout.ep, destination.layout.ep) == (2, 1)
    assert sides("--model tiny", "--source", "TP2 EP2")[1].layout.ep == 2, "without a text it has the source's sizes"
    assert sides("--model tiny", "--source", "TP2 DP3")[0].world_size == 6
    assert sides("--model tiny --source-world-size 8", "--source", "TP2")[0].world_size == 8


def test_a_format_may_come_from_its_own_flag() -> None:
    line = "--model tiny_qwen3_moe --source-format fsdp2"
    assert sides(line, "--source", "TP2 EP2 FSDP2")[0].format == "fsdp2"


def test_layers_that_pp_does_not_divide_are_left_to_flags_where_they_say_so() -> None:
    line = "--model tiny --num-layers 5 --rl-inference-pipeline-model-parallel-size 1"
    assert sides(line, "--source", "PP2")[0].layout.last_stage_layers == 2
    assert sides(f"{line} --decoder-first-pipeline-num-layers 1", "--source", "PP2")[0].layout.last_stage_layers is None


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        ("", "TP2 XP2", "--source 'TP2 XP2': 'XP2' is not one of TPn, EPn, ETPn, PPn, VPPn, DPn, each once"),
        ("", "fsdp2", "--source 'fsdp2' names no size"),
        ("", "vllm TP2", "--source-format: invalid choice: 'vllm'"),
        ("", "fsdp2 PP2", "'PP2' is not one of TPn, EPn, FSDPn, HSDPn"),
        ("--tensor-model-parallel-size 4", "TP2", "contradicts --tensor-model-parallel-size 4: leave one of them out"),
        ("--source-world-size 4", "TP2 DP4", "contradicts --source-world-size 4"),
        ("--source-format autotp", "fsdp2 TP2", "contradicts --source-format autotp"),
    ],
)
def test_other_texts_are_refused(line: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        sides(f"--model tiny_qwen3_moe {line}", "--source", text)
    assert message in str(caught.value)


def test_a_destination_that_no_measurement_uses_is_refused() -> None:
    with pytest.raises(UsageError, match="--destination is for the destination, which --measure train-step does not"):
        sides("--model tiny --measure train-step", "--destination", "TP2")
