"""The search by cycle and decode step: the answer of brute force, rows that say something, errors in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from refit import commands
from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.config.registry import FORMATS, load
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.findings import Findings, Objective
from refit.predict.serving.cycle import Workload, rollouts
from refit.report.plans.answer import answer
from refit.report.plans.explain import explained
from refit.report.plans.search import as_csv, as_json, as_text
from refit.report.plans.search_page import as_html
from refit.report.plans.search_rows import cells_of, merged, name_of
from refit.sweep.search import Search
from refit.sweep.search_sides import side_flags

NODES = replace(load_cluster("h100_ib400"), gpus_per_node=2, inter_bytes_per_s=5e9)
WORK = Workload(batch=16, context=96, prompt=32, rollout_tokens=16 * 128)
BOTH = ("megatron", "vllm")
BASE = Search(("--model=tiny_qwen3_moe",), "TP2", None, 4, NODES, 2, destination_formats=BOTH, workload=WORK)


def points(findings: Findings) -> list[tuple[str, int]]:
    """What ranks and the memory of the Pareto set."""
    front = [findings.found[index] for index in sorted(findings.pareto)]
    return [(f"{one.value(findings.objective):.9g}", one.memory_bytes) for one in front]


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        *((objective, ()) for objective in Objective),
        (Objective.CYCLE, ("--refit-mode=collocated",)),
        (Objective.REFIT, ("--refit-relay=node",)),
    ],
)
def test_fewer_plans_give_the_answers_of_all(objective: Objective, extra: tuple[str, ...]) -> None:
    asked = replace(BASE, common=(*BASE.common, *extra), objective=objective)
    everything, some = asked.run(), replace(asked, every=False).run()
    assert points(some) == points(everything)
    assert len(some.found) + some.num_beaten == len(everything.found)
    texts = [answer(each, merged(each, cells_of(each)), None) for each in (everything, some)]
    assert texts[0] == texts[1]
    planned = {one.flags: one for one in everything.found}
    assert all(one == planned[one.flags] for one in some.found)


def test_fewer_plans_of_fp8_engines_give_the_answers_of_all() -> None:
    """What quantising needs is known only from a plan."""
    wide = ("--kv-channels=128", "--hidden-size=512", "--ffn-hidden-size=2048", "--moe-ffn-hidden-size=256")
    fp8 = (*wide, "--staging-mib=1", "--rl-inference-dtype=fp8-block", "--quantise=destination")
    asked = replace(BASE, common=(*BASE.common, *fp8), objective=Objective.CYCLE)
    everything, some = asked.run(), replace(asked, every=False).run()
    assert points(some) == points(everything)
    assert everything.refused == some.refused


def test_an_open_source_has_the_best_of_all_pairs() -> None:
    asked = replace(BASE, source=None, source_gpus=2, destination_gpus=2, objective=Objective.CYCLE)
    everything, some = replace(asked, max_plans=1000).run(), replace(asked, every=False).run()
    assert points(some) == points(everything)
    assert len(some.found) < len(everything.found) / 2


def test_the_winner_is_that_of_brute_force() -> None:
    """Every layout parsed, planned and bounded for itself."""
    found: dict[str, float] = {}
    source = ("--tensor-model-parallel-size=2", "--source-world-size=2")
    for flags in side_flags("destination", BOTH, 4, 2, 1):
        try:
            scenario = parse([*BASE.common, *source, *flags, "--dry-run"]).scenario
        except UsageError:
            continue
        assert scenario.model is not None
        run = dry_run(scenario, DryRunOptions(None, 2, NODES))
        assert run.bound is not None
        side = scenario.destination
        served = load(FORMATS[side.format].serving or "")(scenario.model, side)
        bounds = rollouts(scenario.model, side, served, NODES, WORK)
        train_s = WORK.train_bound_s(scenario.model, 2, NODES)
        found[side.title] = bounds.cycle(train_s, run.bound.seconds).seconds
    searched = replace(BASE, objective=Objective.CYCLE, every=False).run()
    best = searched.found[0]
    assert best.value(Objective.CYCLE) == pytest.approx(min(found.values()))
    assert found[best.destination] == pytest.approx(min(found.values()))
    assert searched.num_built == len(found) > 20


@pytest.fixture(scope="module")
def findings() -> Findings:
    return replace(BASE, objective=Objective.CYCLE).run()


def test_parts_of_a_cycle_add_up(findings: Findings) -> None:
    for found in findings.found:
        cycle, bounds = found.cycle, found.rollouts
        assert cycle is not None
        assert bounds is not None
        assert cycle.seconds == sum(cycle.parts.values())
        assert cycle.decode_s == pytest.approx(128 * bounds.decode.seconds)
        assert found.value(Objective.CYCLE) == cycle.seconds
    given = replace(BASE, objective=Objective.CYCLE, workload=replace(WORK, train_s=3.0), every=False).run()
    assert given.found[0].train_s == 3.0


def test_rows_that_are_equal_in_every_figure_are_one() -> None:
    asked = Search(("--model=tiny",), "TP2 EP2 ETP1", None, 4, NODES, 2)
    found = asked.run()
    rows = merged(found, cells_of(found))
    assert sum(len(row.members) for row in rows) == len(found.found)
    assert len({(found.found[row.members[0]].source, row.cells) for row in rows}) == len(rows)
    names = [name_of(row, found, None) for row in rows]
    assert any(re.fullmatch(r"TP\d, any EP x ETP = \d", name) for name in names)
    whole = next(row for row, name in zip(rows, names, strict=True) if re.search(r"any EP x ETP = 4", name))
    sizes = {(one.layout.ep, one.layout.etp) for index in whole.members if (one := found.found[index]).layout}
    assert sizes == {(1, 4), (2, 2), (4, 1)}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("objective", [Objective.CYCLE, Objective.DECODE])
def test_texts_fit_the_terminal(width: int, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("search", "explain"):
        monkeypatch.setattr(f"refit.report.plans.{module}.table_width", lambda: width)
    asked = replace(BASE, objective=objective, every=False)
    found = asked.run()
    texts = [as_text(found, NODES, 20), explained(asked.explain("vllm TP1 DP4 EP4"), NODES)]
    assert max(len(line) for text in texts for line in text.split("\n")) <= width
    assert texts[0].startswith("Best: ")
    assert f"a {'cycle' if objective is Objective.CYCLE else 'decode step'} of at least" in texts[0]
    shown = [line for line in texts[0].split("\n") if line.startswith(("* ", "  vllm", "  TP"))]
    assert all(line.startswith("* ") for line in shown)


def test_explained_terms_add_up_to_the_step() -> None:
    text = explained(replace(BASE, objective=Objective.CYCLE).explain("vllm TP1 DP4 EP4"), NODES)
    step = text.split("Decode step:")[1].split(" ms together")[0].split("\n")
    rows = [re.split(r"\s{2,}", line.strip()) for line in step if line.startswith("  ")]
    times = [float(row[5]) for row in rows if len(row) == 8 and row[0] != "term"]
    assert sum(times) == pytest.approx(float(step[-1].replace(",", "")), rel=5e-3)
    assert "expert all-to-all" in text


def test_files_have_the_bounds_of_serving(findings: Findings) -> None:
    rows = json.loads(as_json(findings, NODES, 1))["found"]
    assert [row["cycle_s"] for row in rows] == [found.value(Objective.CYCLE) for found in findings.found]
    for row in rows:
        assert sum(term["seconds"] for term in row["decode_terms"]) == pytest.approx(row["decode_step_s"])
    assert "decode_step_s" in as_csv(findings, NODES, 1).split("\n")[0]
    page = as_html(findings, NODES, 5)
    assert page.count("<circle") == len(findings.found)
    assert "<script" not in page
    assert f"<p>{answer(findings, merged(findings, cells_of(findings)), None)}</p>" in page.replace("&gt;", ">")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of an error, with exit code 2."""
    given = ["search", "--model", "tiny_qwen3_moe", "--source", "TP2", "--gpus", "2", "--cluster", "h100_ib400"]
    assert commands.main([*given, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_bad_input_is_one_line_with_both_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--context 9,999,999 is beyond the model's " in refused(capsys, "--context", "9999999")
    batch = refused(capsys, "--batch", "900000", "--context", "200")
    largest = re.search(r"the largest batch that fits is ([\d,]+): give --batch (\d+) or less", batch)
    assert batch.startswith("error: --batch 900,000: no layout has room")
    assert largest is not None
    fits = ["search", "--model", "tiny_qwen3_moe", "--source", "TP2", "--gpus", "2", "--cluster", "h100_ib400"]
    assert commands.main([*fits, "--batch", largest[2], "--context", "200"]) == 0
    capsys.readouterr()
    path = tmp_path / "links.yaml"
    path.write_text("intra_node_gb_per_s: 400\ninter_node_gb_per_s: 50\ngpus_per_node: 8\n")
    line = refused(capsys, "--cluster", str(path))
    assert "cluster links has no memory_gb_per_s and no bf16_tflops, which bounds of serving need" in line
    path.write_text(path.read_text() + "memory_gb_per_s: 3000\nbf16_tflops: 900\n")
    wide = ["--kv-channels", "128", "--hidden-size", "512", "--ffn-hidden-size", "2048", "--moe-ffn-hidden-size", "256"]
    line = refused(capsys, "--cluster", str(path), "--", *wide, "--rl-inference-dtype", "fp8-block")
    assert "cluster links has no fp8_tflops" in line
    assert "--prompt 96 leaves nothing to generate of --context 96" in refused(
        capsys, "--context", "96", "--prompt", "96"
    )
    assert "--batch is about serving, which --objective refit leaves out" in refused(
        capsys, "--objective", "refit", "--batch", "4"
    )
    assert "is a layout of 4 GPUs, --gpus is 2" in refused(capsys, "--explain", "TP2 EP1 DP2")
    assert "2 ranks are no TP x DP x PP x engines = 2 x 2 x 1 x 1 = 4" in refused(capsys, "--explain", "vllm TP2 DP2")
    assert "'XP4' is not one of" in refused(capsys, "--explain", "XP4")
    assert "none.json" in refused(capsys, "--routing", str(tmp_path / "none.json"))


def test_layouts_that_an_engine_cannot_have_are_counted_with_its_rule(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny_qwen3_moe", "--source", "TP2", "--gpus", "16", "--cluster", "h100_ib400"]
    assert commands.main(["search", *words, "--formats", "vllm", "--objective", "decode"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Left out: \d+ that vllm cannot have: \d+ attention heads cannot be divided by TP size \d+", out)
    rule = r"EP size 16 leaves ranks without any of 8 experts: .* --rl-inference-num-redundant-experts 8"
    assert re.search(rule, out)


def test_a_cycle_without_a_speed_between_nodes_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny_qwen3_moe", "--source", "TP2 EP4", "--gpus", "8", "--cluster", "h200_nvlink"]
    assert commands.main(["search", *words]) == 2
    assert "give --refit-mode collocated, fewer GPUs, or --objective decode" in capsys.readouterr().err


def test_a_terminal_shows_what_is_looked_at_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("refit.report.terminal.live.draw", shown.append)
    replace(BASE, objective=Objective.CYCLE, every=False).run()
    assert shown[0] == "reading the layouts"
    assert any(re.fullmatch(r"looked at 0 of \d+ layouts", text) for text in shown)
    assert any(text.startswith("planned 0 layouts") for text in shown)
