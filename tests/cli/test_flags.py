"""The flags themselves: what --help tells, and where the names of the sizes come from."""

from __future__ import annotations

import argparse
import ast
from dataclasses import fields
from pathlib import Path

import pytest

from refit.cli import flag_types
from refit.cli.flags import full_parser
from refit.config.flag_names import SIZE_FLAGS, size_flag
from refit.config.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
SHOWN = [action for action in full_parser()._actions if action.help != argparse.SUPPRESS]
FLAGS = [flag for flags in SIZE_FLAGS.values() for flag in flags]


@pytest.mark.parametrize("action", SHOWN, ids=lambda action: action.option_strings[0])
def test_help_says_what_a_flag_does_and_its_default(action: argparse.Action) -> None:
    assert action.help
    if action.nargs != 0:
        assert "default: " in action.help or "required" in action.help
    if (
        isinstance(action.default, str | int | float | Path)
        and action.default != argparse.SUPPRESS
        and action.nargs != 0
    ):
        assert (
            f"default: {action.default:g}" if isinstance(action.default, float) else str(action.default) in action.help
        )


def test_help_names_units() -> None:
    text = full_parser().format_help()
    for flag, unit in (
        ("--staging-mib MIB", "in MiB; default: 512"),
        ("--timeout SECONDS", "in seconds; default: 300"),
    ):
        assert unit in " ".join(text.partition(flag)[2].split())


def test_each_size_of_each_side_has_one_flag() -> None:
    sizes = {field.name for field in fields(Layout)} - {"first_rank", "chunk_sizes", "chunk_predictions"}
    assert SIZE_FLAGS.keys() == sizes
    assert len(set(FLAGS)) == 2 * len(sizes)
    assert {f"--{flag}" for flag in FLAGS} <= full_parser()._option_string_actions.keys()
    assert size_flag("source", "ep") == "--expert-model-parallel-size"
    assert size_flag("destination", "etp") == "--rl-inference-expert-tensor-model-parallel-size"


def test_names_of_sizes_stand_in_one_list() -> None:
    """No other module of refit has one of them as a string of its own; messages may mention them."""
    lists = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "refit").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.removeprefix("--") in FLAGS
    ]
    assert set(lists) == {"refit/config/flag_names.py"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("refit", ("refit",)),
        ("megatron", ("megatron",)),
        ("both", ("refit", "megatron")),
        ("refit,megatron", ("refit", "megatron")),
        ("megatron,refit", ("megatron", "refit")),
        ("megatron,refit,megatron", ("megatron", "refit")),
        ("megatron,both", ("megatron", "refit")),
    ],
)
def test_engines(text: str, names: tuple[str, ...]) -> None:
    assert flag_types.engines(text) == names


@pytest.mark.parametrize("text", ["", "refit,", "refit,rfit", "refit megatron", "Refit"])
def test_an_unknown_engine_lists_the_known_ones(text: str) -> None:
    known = "refit, megatron, nccl-m2n, vllm-reload, vllm-ipc, checkpoint-engine, full, both"
    with pytest.raises(argparse.ArgumentTypeError, match=rf"invalid choice: '.*' \(choose from {known}\)"):
        flag_types.engines(text)
