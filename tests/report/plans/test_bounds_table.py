"""The tables of docs/scenarios.md come from a command, and are what it prints today."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from refit.cli.flag_parser import FlagParser
from refit.commands import bounds
from refit.errors import UsageError
from tests.plan.test_cost import cluster

SCENARIOS_DOC = Path(__file__).resolve().parents[3] / "docs/scenarios.md"


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = FlagParser(prog="refit")
    bounds.add(parser.add_subparsers())
    return parser.parse_args(argv)


@pytest.mark.slow
def test_the_tables_in_the_documents_are_current(tmp_path: Path) -> None:
    text = SCENARIOS_DOC.read_text(encoding="utf-8")
    command = re.search(rf"{bounds.BEGIN} (refit bounds .+) -->", text)
    assert command is not None
    copy = tmp_path / "scenarios.md"
    copy.write_text(text, encoding="utf-8")
    args = parsed([str(copy) if word == "docs/scenarios.md" else word for word in shlex.split(command[1])[1:]])
    assert args.run(args) == 0
    assert copy.read_text(encoding="utf-8") == text, f"run: python -m {command[1]}"


def test_a_row_says_what_a_scenario_needs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('title: Mine\ndefaults: {model: tiny}\nscenarios: ["2:2:2:1:collocated:nccl:small"]\n')
    table = bounds.section(bounds.select_file(str(path), []), [cluster(1e9, 1e8, 2), cluster(1e9, None, 2)])
    title, _, names, line, row = table.splitlines()
    assert title == "### Mine"
    assert [cell.strip() for cell in names.strip("|").split("|")][-2:] == ["bound, example"] * 2
    assert line.count("---") == names.count("|") - 1
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["small", "max(4, 2) = 4"]
    wire_gb, bound_s = cells[3], cells[-2]
    assert wire_gb.endswith("MB")
    assert bound_s.endswith("ms")
    assert cells[-1] == "-"  # bytes cross nodes of two GPUs, at no known speed


def test_a_floor_stands_beside_a_bound_that_does_not_reach_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    flags = ("model: tiny_qwen3_moe", "refit-method: nccl", "source-world-size: 4", "rl-inference-format: vllm")
    flags += ("rl-inference-data-parallel-size: 4", "rl-inference-tensor-model-parallel-size: 1")
    path.write_text(f"title: Mine\nscenarios: [{{name: dp4, {', '.join(flags)}}}]\n")
    row = bounds.section(bounds.select_file(str(path), []), [cluster(1e9, 1e8, 4)]).splitlines()[-1]
    bound, _, floor = row.strip("|").split("|")[-1].partition(", floor ")
    assert float(floor.split()[0]) < float(bound.split()[0])


def test_a_document_without_a_place_for_tables(tmp_path: Path) -> None:
    path = tmp_path / "plain.md"
    path.write_text("# Nothing here\n")
    with pytest.raises(UsageError, match="has no place for tables"):
        bounds.inserted(path, "| a |")
    with pytest.raises(UsageError, match="cannot be read"):
        bounds.inserted(tmp_path / "missing.md", "| a |")


def test_tables_replace_what_was_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text(f"before\n{bounds.BEGIN} refit bounds x -->\nold\n{bounds.END}\nafter\n")
    text = bounds.inserted(path, "new")
    assert text == f"before\n{bounds.BEGIN} refit bounds x -->\n\nnew\n\n{bounds.END}\nafter\n"


def test_a_title_from_a_file_changes_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('title: "a\\e[31m|b"\nscenarios: ["2:2:2:1:collocated:nccl:small"]\ndefaults: {model: tiny}\n')
    args = parsed(["bounds", str(path), "--cluster", "h100_ib400"])
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"a\\x1b\[31m\|b" in shown
