"""The search of layouts, against exhaustive counts and its own promises."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit import commands
from refit.cli.layout_text import layout_from_text
from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.config.layout import Layout
from refit.config.relay import Relay
from refit.errors import UsageError
from refit.predict.findings import Findings, pareto
from refit.predict.sides import check_side
from refit.report.plans.search import as_csv, as_json, as_text
from refit.sweep.search import Search
from refit.sweep.search_scenarios import scenario_file
from refit.sweep.selection import select_file

CLUSTER = load_cluster("h100_ib400")


def search(**changes: object) -> Search:
    asked = Search(("--model=tiny",), "TP2 EP2 ETP1", None, 4, CLUSTER, 8)
    return replace(asked, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> Findings:
    return search().run()


def test_every_layout_that_can_be_built_is_found_once(small: Findings) -> None:
    scenario = parse(["--dry-run", "--model=tiny"]).scenario
    assert scenario.model is not None
    expected = set()
    for tp in (1, 2, 4):
        for ep in (1, 2, 4):
            for etp in (1, 2, 4):
                try:
                    layout = Layout(tp, ep, etp, 1, 4)
                    check_side(scenario.model, replace(scenario.destination, layout=layout), "destination")
                except UsageError:
                    continue
                expected.add(replace(scenario.destination, layout=layout).title)
    assert sorted(found.destination for found in small.found) == sorted(expected)
    assert len(expected) == small.num_built > 10


def test_engines_are_searched_with_attention_replicas_and_several_engines() -> None:
    tiny = ("--model=tiny_qwen3_moe",)
    found = search(common=tiny, source="TP2", destination_formats=("vllm",), max_plans=1000).run().found
    titles = {one.destination for one in found}
    assert {"vllm TP4 EP4", "vllm TP1 DP4 EP4", "vllm TP2 DP2 EP1", "vllm TP1 EP1 x4", "vllm TP2 EP2 x2"} <= titles
    assert len(titles) == len(found)
    assert all(one.destination_ranks == 4 for one in found)


def test_found_layouts_come_in_the_order_of_their_bounds(small: Findings) -> None:
    bounds = [found.bound_s for found in small.found]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]


def test_the_bound_is_that_of_a_dry_run(small: Findings) -> None:
    from refit.predict.dry_run import DryRunOptions, dry_run

    for found in small.found[::4]:
        run = dry_run(parse([*found.flags, "--dry-run"]).scenario, DryRunOptions(None, 8, CLUSTER))
        assert found.bound == run.bound
        assert found.memory_bytes == max(run.destination_bytes.values()) + run.scenario.staging_bytes
        assert found.wire_bytes == run.cost.wire_bytes


WIDE = ("--model=tiny_qwen3_moe", "--kv-channels=128", "--hidden-size=512", "--ffn-hidden-size=2048")
WIDE += ("--moe-ffn-hidden-size=256", "--staging-mib=1")
FP8 = ("--rl-inference-dtype=fp8-block",)


@pytest.mark.parametrize("mode", ["collocated", "non-collocated"])
def test_fp8_destinations_are_half_as_large_and_leave_more_for_the_cache(mode: str) -> None:
    from refit.predict.dry_run import DryRunOptions, dry_run

    asked = search(common=(*WIDE, f"--refit-mode={mode}"), source="TP2", destination_formats=("vllm",))
    plain, quantised = (
        {found.destination.removesuffix(" fp8-block"): found for found in each.run().found}
        for each in (asked, replace(asked, common=(*asked.common, *FP8)))
    )
    assert quantised.keys() <= plain.keys()
    assert len(quantised) > 4
    for title, found in quantised.items():
        run = dry_run(parse([*found.flags, "--dry-run"]).scenario, DryRunOptions(None, 8, CLUSTER))
        held = run.held_bytes["both" if mode == "collocated" else "destination"]
        assert found.memory_bytes == max(held.values()) + run.scenario.staging_bytes
        assert found.bound == run.bound
        if mode == "non-collocated":
            assert found.memory_bytes < 0.8 * plain[title].memory_bytes
            assert (found.kv_tokens or 0) > (plain[title].kv_tokens or 0)


@pytest.mark.parametrize("mode", ["collocated", "non-collocated"])
def test_what_fits_by_its_weights_but_cannot_quantise_is_left_out(mode: str) -> None:
    """All blocks are quantised where they arrive, so their BF16 weights wait there."""
    common = (*WIDE, *FP8, "--quantise=destination", f"--refit-mode={mode}")
    everything = search(common=common, source="TP2", destination_formats=("vllm",)).run()
    needed = sorted(found.memory_bytes for found in everything.found)
    limit = needed[len(needed) // 2]
    small = replace(CLUSTER, gpu_memory_bytes=limit)
    some = search(common=common, source="TP2", destination_formats=("vllm",), cluster=small).run()
    assert sorted(found.memory_bytes for found in some.found) == [nbytes for nbytes in needed if nbytes <= limit]
    assert some.num_too_large == len(needed) - len(some.found)
    least = replace(CLUSTER, gpu_memory_bytes=needed[0] - 1)
    with pytest.raises(UsageError, match=f"the smallest needs {needed[0] / 1e9:.1f} GB per GPU"):
        search(common=common, source="TP2", destination_formats=("vllm",), cluster=least).run()


@pytest.mark.parametrize("mode", ["collocated", "non-collocated"])
def test_what_was_not_planned_has_no_lower_bound_than_stated(mode: str) -> None:
    asked = search(common=("--model=tiny", f"--refit-mode={mode}"))
    everything = asked.run()
    some = replace(asked, max_plans=3).run()
    assert some.num_unplanned == len(everything.found) - 3
    planned = {found.flags for found in some.found}
    assert some.unplanned_floor_s is not None
    assert all(found.bound_s >= some.unplanned_floor_s for found in everything.found if found.flags not in planned)


def test_an_open_source_is_searched_too() -> None:
    found = search(source=None, source_gpus=2, destination_gpus=1).run().found
    assert {one.source for one in found} == {"TP1 EP1", "TP1 EP2", "TP1 EP1 ETP2", "TP2 EP1", "TP2 EP2 ETP1"} | {
        "TP2 EP1 ETP1",
    }
    assert all(one.source_ranks == 2 for one in found)


def test_layers_that_pp_does_not_divide_leave_the_rest_to_the_last_stage() -> None:
    flags = layout_from_text("source", "TP8 EP8 PP4", None, 61)
    assert "--decoder-last-pipeline-num-layers=13" in flags
    parse(["--dry-run", "--model=kimi_k2", *flags, "--rl-inference-pipeline-model-parallel-size=1"])


def test_what_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(UsageError, match=r"smallest needs \d+\.\d GB per GPU, h100_ib400 has 80\.0 GB: raise --gpus"):
        search(common=("--model=kimi_k2",), source="TP8 EP8").run()


def test_what_cannot_be_built_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"source: \d+ attention heads cannot be divided by TP size 16"):
        search(source="TP16").run()


def test_a_layout_reads_as_it_is_written() -> None:
    for text in ("TP8 EP8", "TP2 EP4 ETP1", "TP4 EP1 PP2"):
        flags = layout_from_text("source", text, None, 4)
        assert parse(["--dry-run", "--model=tiny", *flags]).scenario.source.title == text


@pytest.mark.parametrize("text", ["", "TP8 TP4", "TP0", "XP3", "TP8,EP2", "TP99999999999", "\x1b[31mTP2"])
def test_other_texts_are_no_layout(text: str) -> None:
    with pytest.raises(UsageError, match=r"as in 'TP8 EP8 PP4'"):
        layout_from_text("source", text, None, 4)


def test_the_best_can_be_written_as_a_list_of_scenarios(small: Findings, tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(scenario_file(small.found[:5], "tiny"))
    titles = [parse(candidate.flags).scenario.title for candidate in select_file(str(path), []).candidates]
    assert titles == [f"{found.source} -> {found.destination}" for found in small.found[:5]]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("source", ["TP2 EP2 ETP1", None])
def test_the_table_fits_the_terminal(width: int, source: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refit.report.plans.search.table_width", lambda: width)
    text = as_text(search(source=source, source_gpus=2, max_plans=30).run(), CLUSTER, 10)
    assert max(map(len, text.split("\n"))) <= width
    assert "…" not in text
    table = text[text.index("(ms)") :].split("\n")[1:]
    first, second, *_ = (line for line in table if " TP" in line and ":" not in line)
    assert first.startswith("* TP")
    assert second.startswith(("* TP", "  TP"))
    assert (" -> " in first) == (source is None)


def test_an_fp8_dtype_is_said_once_not_in_every_row(small: Findings) -> None:
    common = (*WIDE, *FP8)
    text = as_text(search(common=common, source="TP2", destination_formats=("vllm",)).run(), CLUSTER, 10)
    assert text.count("Dtype:   fp8-block") == 1
    assert "fp8-block" not in text[text.index("(ms)") :]
    assert "fp8-block" not in as_text(small, CLUSTER, 10)


def test_json_and_csv_have_every_layout(small: Findings) -> None:
    import csv
    import io
    import json

    rows = json.loads(as_json(small, CLUSTER, 1))["found"]
    table = list(csv.DictReader(io.StringIO(as_csv(small, CLUSTER, 1))))
    assert len(rows) == len(table) == len(small.found)
    assert [row["lower_bound_s"] for row in rows] == [found.bound_s for found in small.found]
    assert [float(row["lower_bound_s"]) for row in table] == [found.bound_s for found in small.found]
    assert sum(row["pareto"] for row in rows) == len(small.pareto)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_the_pareto_set_beats_every_other_point(points: list[tuple[int, int]]) -> None:
    front = pareto(points)
    for index, point in enumerate(points):
        others = [points[other] for other in front if other != index]
        as_good = any(other[0] <= point[0] and other[1] <= point[1] for other in others)
        assert as_good != (index in front)


RELAYED = Search(("--model=tiny_qwen3_moe",), "TP2", None, 4, replace(CLUSTER, gpus_per_node=2), 2, max_plans=1000)


def test_relays_and_the_floor_stand_beside_the_bound() -> None:
    asked = replace(RELAYED, destination_formats=("vllm",))
    off = {one.destination: one for one in asked.run().found}
    on = {one.destination: one for one in replace(asked, common=(*asked.common, "--refit-relay=node")).run().found}
    assert off.keys() == on.keys()
    for title, found in on.items():
        direct, crossing = off[title].crossing, found.crossing
        assert crossing is not None
        assert direct is not None
        assert crossing.direct_bytes == direct.between_bytes >= crossing.between_bytes >= crossing.least_bytes
        assert found.floor == off[title].floor
        assert found.floor is not None
        assert found.floor.seconds <= found.bound_s * (1 + 1e-9)
        assert crossing.relay is Relay.NODE
        assert "--refit-relay=off" not in found.flags


def test_a_layout_that_has_nothing_to_relay_is_planned_without_and_its_flags_say_so() -> None:
    """Each rank is a node of its own."""
    alone = replace(CLUSTER, gpus_per_node=1)
    found = replace(RELAYED, common=(*RELAYED.common, "--refit-relay=node"), cluster=alone, gpus_per_node=1).run().found
    assert len(found) > 4
    assert all(one.crossing is not None and one.crossing.relay is Relay.OFF for one in found)
    assert all(parse([*one.flags, "--dry-run"]).scenario.relay is Relay.OFF for one in found)


def test_what_was_not_planned_has_no_lower_bound_than_stated_with_relays_too() -> None:
    asked = replace(RELAYED, common=(*RELAYED.common, "--refit-relay=auto"), destination_formats=("vllm",))
    everything, some = asked.run(), replace(asked, max_plans=2).run()
    assert some.unplanned_floor_s is not None
    planned = {found.flags for found in some.found}
    assert all(found.bound_s >= some.unplanned_floor_s for found in everything.found if found.flags not in planned)


def test_texts_and_rows_of_several_nodes_say_what_crosses() -> None:
    import json

    asked = replace(RELAYED, common=(*RELAYED.common, "--refit-relay=auto"), destination_formats=("vllm",))
    findings = asked.run()
    text = as_text(findings, CLUSTER, 10)
    assert "between" in text
    assert "floor" in text
    rows = json.loads(as_json(findings, CLUSTER, 1))["found"]
    assert {row["relay"] for row in rows} == {"engine", "off"}
    assert all(row["direct_bytes"] >= row["between_bytes"] >= row["least_bytes"] for row in rows)
    assert "between" not in as_text(search().run(), CLUSTER, 10)


def shown_by(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert commands.main(["search", "--model", "tiny", "--objective", "refit", "--all", *words]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_next_steps_are_whole_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    words = ["--source", "TP2 EP2", "--gpus", "2", "--cluster", "h200_nvlink", "--best", "2"]
    _, aside = shown_by(capsys, *words, "--write-scenarios", str(path))
    plan, run = re.findall(r"^(?:plan them|run them in an allocation): (.*)$", aside, re.MULTILINE)
    assert "the largest on 6 GPUs (1 node)" in aside
    program, words = shlex.split(plan)[:3], shlex.split(plan)[3:]
    assert [os.path.abspath(program[0]), *program[1:]] == [sys.executable, "-m", "refit"]
    assert commands.main(words) == 0
    planned = capsys.readouterr().out
    assert "8 GPUs, cluster h200_nvlink" in planned
    assert "2 ready" in planned
    commands.command_parser("sweep").parse_args(shlex.split(run)[3:])


def test_rows_that_are_left_out_and_bounds_that_are_missing_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = shown_by(capsys, "--source", "TP2 EP4", "--gpus", "8", "--cluster", "h200_nvlink", "--top", "2")
    assert re.search(r"^  \d+ more: --top \d+$", out, re.MULTILINE)
    assert "h200_nvlink has no speed between nodes of 8 GPUs, and\n16 GPUs are on several: give --refit-mode" in out
    assert max(map(len, out.split("\n"))) <= 120
    out, _ = shown_by(capsys, "--source", "TP2 EP2", "--gpus", "2", "--cluster", "h200_nvlink")
    assert " more: " not in out
    assert "no bound" not in out


def test_a_flag_of_the_scenario_is_told_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", "--source", "TP2", "--gpus", "2", "--cluster", "h200_nvlink", "--hf-config", "config.json"]
    assert commands.main(words) == 2
    assert "--hf-config is a flag of benchmark_refit.py: give it at the end, after --" in capsys.readouterr().err
    assert commands.main([*words[:-2], "--nonsense"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
