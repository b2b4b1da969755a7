"""Lists of scenarios: what their lines and files mean, and what is wrong with them in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.config import yaml_files
from refit.config.scenario import Mode
from refit.errors import UsageError
from refit.sweep.selection import Selection, select_file, select_lines

EP_REFIT = "8:8:8:4:non-collocated:nvshmem:ep_refit"
KIMI_K2 = ("--model", "kimi_k2")


def names(selection: Selection) -> list[str]:
    return [candidate.name for candidate in selection.candidates]


def from_text(tmp_path: Path, text: str, *common: str) -> Selection:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    return select_file(str(path), common)


def test_a_line_is_a_scenario_with_etp_at_tp() -> None:
    selection = select_lines([EP_REFIT, " 16:8 : 8:16:collocated:nccl: swap"], KIMI_K2, "Kimi K2")
    assert (selection.title, names(selection)) == ("Kimi K2", ["ep_refit", "swap"])
    first, second = (parse(candidate.flags).scenario for candidate in selection.candidates)
    assert (first.title, first.mode, first.method, first.model_name) == (
        "TP8 EP8 -> TP8 EP4",
        Mode.NON_COLLOCATED,
        "nvshmem",
        "kimi_k2",
    )
    assert (second.title, second.mode, second.method) == ("TP16 EP8 -> TP8 EP16", Mode.COLLOCATED, "nccl")
    assert (first.source.layout.etp, first.destination.layout.etp) == (8, 8)


def test_flags_of_all_scenarios_come_before_their_own() -> None:
    selection = select_lines([EP_REFIT], [*KIMI_K2, "--num-benchmark-iterations", "9", "--refit-method", "gloo"])
    run = parse(selection.candidates[0].flags).scenario
    assert (run.num_iterations, run.method) == (9, "nvshmem")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "8:8:8:4:non-collocated:nvshmem",
            "scenario line 2 '8:8:8:4:non-collocated:nvshmem': 6 fields, 7 are needed: SRC_TP:",
        ),
        ("8:8:8:4:non-collocated:nvshmem:a:b", "8 fields, 7 are needed"),
        ("", "1 fields, 7 are needed"),
        ("8:0:8:4:non-collocated:nvshmem:x", "SRC_EP must be a whole number from 1 up, not '0'"),
        ("8:8:8:four:non-collocated:nvshmem:x", "DST_EP must be a whole number from 1 up, not 'four'"),
        ("-8:8:8:4:non-collocated:nvshmem:x", "SRC_TP must be a whole number from 1 up, not '-8'"),
        ("8:8:8:4:colocated:nvshmem:x", "REFIT_MODE must be collocated or non-collocated, not 'colocated'"),
        (
            "8:8:8:4:collocated:mpi:x",
            "REFIT_METHOD must be cuda-ipc or nvshmem or nccl or cuda-ipc+nccl or shm or shm+gloo or gloo or nixl or "
            "auto, not 'mpi'",
        ),
        ("8:8:8:4:collocated:nccl:a/b", "DESCRIPTION 'a/b' cannot be part of a file name: use 1 to 150 letters"),
        ("8:8:8:4:collocated:nccl:", "DESCRIPTION '' cannot be part of a file name"),
        ("8:8:8:4:collocated:nccl:a.2", "DESCRIPTION 'a.2' cannot be part of a file name"),
        ("8:8:8:4:collocated:nccl:summary", "DESCRIPTION 'summary' is taken by a file of the sweep itself"),
        (
            EP_REFIT,
            "scenario line 2 '8:8:8:4:non-collocated:nvshmem:ep_refit': name 'ep_refit' is taken by scenario line 1",
        ),
    ],
)
def test_a_malformed_line(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_lines([EP_REFIT, line], KIMI_K2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("common", "message"),
    [
        (["--output-dir=x"], "--output-dir cannot be given to a sweep's scenarios: results lie beside the sweep file"),
        (["--num-gpus", "8"], "--num-gpus cannot be given"),
        (["--num-layer", "8"], "did you mean --num-layers?"),
        (["--model", "kimi_k3"], "unknown model 'kimi_k3': did you mean kimi_k2?"),
        (["--train-iters=10", "--split=a\tb"], "holds a line break or another control character"),
    ],
)
def test_flags_that_no_scenario_can_take(common: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_lines([EP_REFIT], common)
    assert message in str(caught.value)


def test_shares_of_changed_weights_are_an_axis(tmp_path: Path) -> None:
    selection = from_text(
        tmp_path,
        """
        title: Shares
        defaults: {model: tiny, refit-method: gloo, refit-encoding: delta}
        scenarios:
          - {name: at, delta-changed-share: [0.1%, 1%, 50%]}
        """,
    )
    deltas = [parse(candidate.flags).scenario.delta for candidate in selection.candidates]
    assert [delta.shares for delta in deltas if delta] == [(0.001,), (0.01,), (0.5,)]
    assert len(set(names(selection))) == 3


def test_lists_are_axes_unless_the_flag_takes_a_list(tmp_path: Path) -> None:
    selection = from_text(
        tmp_path,
        """
        title: Axes
        defaults: {model: tiny, refit-method: [gloo, shm], verify: sample, swiglu: true}
        scenarios:
          - {name: ep, expert-model-parallel-size: [1, 2], data-path: [a, b]}
          - {name: one, refit-method: gloo, swiglu: false, model: qwen3_30b_a3b}
          - "1:2:1:1:collocated:shm:line"
        """,
    )
    assert names(selection) == ["ep_gloo_1", "ep_gloo_2", "ep_shm_1", "ep_shm_2", "one", "line"]
    assert [candidate.is_cell for candidate in selection.candidates] == [True] * 4 + [False] * 2
    runs = [parse(candidate.flags).scenario for candidate in selection.candidates]
    assert [(run.method, run.source.layout.ep) for run in runs[:4]] == [
        ("gloo", 1),
        ("gloo", 2),
        ("shm", 1),
        ("shm", 2),
    ]
    assert runs[0].recorded == {"data-path": ["a", "b"]}
    assert (runs[4].model_name, runs[5].method, runs[5].verify.value) == ("qwen3_30b_a3b", "shm", "sample")
    assert "--swiglu" in selection.candidates[0].flags
    assert "--swiglu" not in selection.candidates[4].flags


def test_common_flags_override_defaults_and_not_the_scenarios_own(tmp_path: Path) -> None:
    text = "defaults: {model: kimi_k2, refit-method: shm}\nscenarios: [{name: a, num-benchmark-iterations: 3}]\n"
    selection = from_text(tmp_path, text, "--model", "tiny", "--num-benchmark-iterations", "9")
    run = parse(selection.candidates[0].flags).scenario
    assert (run.model_name, run.num_iterations) == ("tiny", 3)
    assert selection.title == "list"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scenarios: []\n", "scenarios must be a list"),
        ("title: x\n", "scenarios must be a list"),
        ("- name: a\n  model: tiny\n", "not a list: put the list of them below `scenarios:`"),
        ("scenario: [x]\n", "unknown key scenario: title, defaults and scenarios are known"),
        ("defaults: [model]\nscenarios: [{name: a}]\n", "defaults must hold `flag: value` lines"),
        ("scenarios: [{model: tiny}]\n", "scenario 1: must be a CONFIGS line or hold `name: ...`"),
        ("scenarios: [17]\n", "scenario 1: must be a CONFIGS line"),
        ("scenarios: ['1:1:1:1:collocated:gloo']\n", "scenario 1: 6 fields, 7 are needed"),
        ("scenarios: [{name: a, num-layer: 2}]\n", "scenario 1: unknown flag --num-layer: did you mean --num-layers?"),
        ("scenarios: [{name: a, num-layers: []}]\n", "num-layers is an empty list"),
        ("scenarios: [{name: a, num-layers: [2, x]}]\n", "scenario 1: --num-layers: expected a whole number, got 'x'"),
        ("scenarios: [{name: a, run-name: b}]\n", "run-name cannot stand in a scenario"),
        ("defaults: {output-dir: b}\nscenarios: [{name: a}]\n", "output-dir cannot stand in a scenario"),
        ("scenarios: [{name: a b}]\n", "name 'a b' cannot be part of a file name"),
        ("scenarios: [{name: a, num-layers: [2, 2]}]\n", "scenario 1, twice: name 'a_2' is taken"),
    ],
)
def test_a_malformed_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_text(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "list.yaml") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"scenarios: [{{name: a, num-layers: {list(range(1, 101))}, hidden-size: {list(range(1, 101))}}}]\n",
        "scenarios:\n" + "- 1:1:1:1:collocated:gloo\n" * 9_000,
    ],
)
def test_too_many_scenarios_are_refused_with_both_numbers(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"list\.yaml: (10|9),000 scenarios .*, 500 are the most"):
        from_text(tmp_path, text)


def test_an_unknown_list_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="unknown scenario 'kimi': did you mean"):
        select_file("kimi", [])


@pytest.mark.parametrize("name", yaml_files.names("scenarios"))
def test_the_lists_that_come_with_the_suite(name: str) -> None:
    selection = select_file(name, [])
    assert selection.candidates
    assert selection.title != name


def test_the_references_lists() -> None:
    kimi_k2 = [parse(candidate.flags).scenario for candidate in select_file("kimi_k2", []).candidates]
    assert [run.title for run in kimi_k2] == [
        "TP8 EP8 -> TP8 EP4",
        "TP16 EP4 -> TP8 EP4",
        "TP16 EP4 -> TP16 EP2",
        "TP16 EP4 -> TP32 EP2",
        "TP8 EP8 -> TP16 EP4",
        "TP16 EP8 -> TP8 EP16",
        "TP32 EP4 -> TP16 EP8",
    ]
    eight = [parse(candidate.flags).scenario for candidate in select_file("8gpu", []).candidates]
    assert [run.num_ranks for run in eight] == [6, 8, 6, 3, 8, 6, 8, 8, 8, 4]
    assert {(run.source.layout.etp, run.destination.layout.etp) for run in eight} == {(1, 1)}
    assert [run.method for run in eight] == ["nvshmem"] * 6 + ["nccl"] * 4
    assert eight[3].model is not None
    assert (eight[3].model.num_layers, eight[3].model.hidden_size, eight[3].num_iterations) == (2, 512, 2)


def test_both_methods_run_the_same_ten() -> None:
    ten = [parse(candidate.flags).scenario for candidate in select_file("8gpu", []).candidates]
    twenty = [parse(candidate.flags).scenario for candidate in select_file("8gpu_methods", []).candidates]
    assert [run.method for run in twenty] == ["nvshmem", "nccl"] * 10
    for number, run in enumerate(twenty):
        same = ten[number // 2]
        assert (run.model, run.source, run.destination, run.mode) == (
            same.model,
            same.source,
            same.destination,
            same.mode,
        )
