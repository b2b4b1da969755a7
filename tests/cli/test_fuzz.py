"""Random flags and YAML files: the parsers and the dry run end in a plan or in a RefitError, never in another error."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refit.cli.flags import full_parser
from refit.cli.parsing import parse
from refit.cli.presets import load_preset
from refit.config.clusters import load_cluster
from refit.errors import RefitError
from refit.predict.dry_run import dry_run
from refit.sweep.selection import select_file

QUICK, LONG = 40, 600
FLAGS = sorted(flag for flag in full_parser()._option_string_actions if flag not in ("-h", "--help", "--version"))
BASE = ["--dry-run", "--num-layers=2", "--hidden-size=64", "--num-attention-heads=4", "--num-experts=8"]
NUMBERS = ["-1", "0", "1", "2", "3", "4", "8", "64", "1000", "4294967296", "9" * 30, "9" * 5000, "1e300", "nan", "inf"]
TEXTS = [
    "",
    "x",
    "tiny",
    "gloo",
    "local",
    "a:b",
    "[0]*2",
    "[" * 300,
    "[0]+" * 900 + "[1]",
    "\x1b[31m",
    "é",
    "2020-01-01",
]
VALUES = st.sampled_from([*NUMBERS, *TEXTS]) | st.text(max_size=8)
YAML_VALUES = VALUES | st.sampled_from(
    [
        ".nan",
        ".inf",
        "!!int 'abc'",
        "!!binary aGk=",
        "[1, 2]",
        "{a: 1}",
        "[" * 3000,
        "&a [*a]",
        "{",
        "!x y",
        "0x1F",
        "yes",
    ]
)
KEYS = [
    *(flag.removeprefix("--") for flag in FLAGS),
    *("title", "defaults", "scenarios", "name", "intra_node_gb_per_s", "gpus_per_node", "gpu_memory_gb", "gpu"),
]
DOCUMENTS = st.lists(st.tuples(st.sampled_from(KEYS), YAML_VALUES), max_size=5).map(
    lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs)
)
LISTS = st.lists(st.tuples(st.sampled_from(KEYS), YAML_VALUES), max_size=4).map(
    lambda pairs: "scenarios:\n- name: a\n" + "".join(f"  {key}: {value}\n" for key, value in pairs)
)
CLUSTERS = DOCUMENTS.map(lambda text: f"intra_node_gb_per_s: 1\n{text}")


def plan(words: list[str]) -> None:
    with contextlib.suppress(RefitError):
        request = parse([*BASE, *words])
        # A plan of many ranks is correct, and slow.
        if request.dry_run is not None and request.scenario.num_ranks <= 64:
            dry_run(request.scenario, request.dry_run)


def read(text: str, reader: Callable[[str], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(text, encoding="utf-8")
        with contextlib.suppress(RefitError):
            reader(str(path))


def fuzz_flags(examples: int) -> None:
    words = st.lists(st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join) | VALUES, max_size=5)
    run(examples, words, plan)


def fuzz_yaml(examples: int) -> None:
    for documents, reader in (
        (DOCUMENTS | st.text(max_size=30), load_preset),
        (CLUSTERS, load_cluster),
        (LISTS | DOCUMENTS, lambda path: select_file(path, ["--model=tiny"])),
    ):
        run(examples, documents, lambda text, reader=reader: read(text, reader))


def run(examples: int, inputs: st.SearchStrategy, test: Callable) -> None:  # type: ignore[type-arg]
    check = settings(max_examples=examples, deadline=20_000, suppress_health_check=list(HealthCheck), database=None)
    check(given(inputs)(lambda value: test(value)))()


@pytest.mark.parametrize("fuzz", [fuzz_flags, fuzz_yaml])
def test_random_input_ends_in_a_plan_or_one_error(fuzz: Callable[[int], None]) -> None:
    fuzz(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_flags, fuzz_yaml])
def test_much_random_input(fuzz: Callable[[int], None]) -> None:
    fuzz(LONG)
