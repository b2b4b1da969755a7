"""The scenarios of the Kimi K2 script and those of configs/scenarios/kimi_k2.yaml are the same."""

from __future__ import annotations

import re
from pathlib import Path

from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.sweep.selection import select_file, select_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmark_refit_kimi_k2.sh"


def test_the_script_and_the_file_list_the_same_scenarios() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    array = re.search(r"^CONFIGS=\(\n(.*?)^\)", text, re.MULTILINE | re.DOTALL)
    title = re.search(r'^TITLE="(.+)"$', text, re.MULTILINE)
    cluster = re.search(r"^CLUSTER=(\w+)$", text, re.MULTILINE)
    assert array is not None
    assert title is not None
    assert cluster is not None
    lines = re.findall(r'^\s*"(\d.*)"', array[1], re.MULTILINE)
    script = select_lines(lines, ["--model", "kimi_k2", "--num-benchmark-iterations", "5"], title[1])
    file = select_file("kimi_k2", [])
    assert len(lines) == 7
    assert script.title == file.title
    assert [candidate.name for candidate in script.candidates] == [candidate.name for candidate in file.candidates]
    for mine, listed in zip(script.candidates, file.candidates, strict=True):
        assert parse(mine.flags) == parse(listed.flags)
    assert load_cluster(cluster[1]).name == cluster[1]


def test_the_slurm_tests_list_can_be_read() -> None:
    """It uses anchors and merge keys, as users' lists do."""
    selection = select_file(str(ROOT / "tests/slurm/scenarios.yaml"), [])
    assert [candidate.name for candidate in selection.candidates] == ["one_node", "two_nodes", "broken", "too_large"]
