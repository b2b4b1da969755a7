"""Every row of every output names what moved its bytes, and no ratio stands bare between two transports.

On CPUs the baseline goes over Gloo whatever our method is. The same run is read from a file of a version that did not
record what moved a baseline's bytes.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.matrix import Cell, row
from docs.tables import refits as results_text
from refit.report.plots import changes
from refit.report.plots.times import bars_of
from refit.report.refits import refit_lines
from refit.report.refits.analysis import analysis_text
from refit.report.refits.compare import compare_runs, compare_text
from refit.report.refits.export import csv_text, json_text, records
from refit.report.refits.headline import headlines
from refit.report.refits.markdown import markdown_report
from refit.report.refits.page import Pictures, page
from refit.report.refits.run_spread import spread_lines
from refit.report.refits.summary import summary_text
from refit.results.outcomes import Outcome, judged
from refit.results.refit import EngineResult
from refit.results.result import Result, encoded, read_result
from refit.results.runs import Run
from refit.results.sweep import Planned
from tests.report.factories import planned, result, side, sweep_of, timed

WAYS = "shm against Megatron-Core's gloo"
ENTRY = planned("a", side(2, 2), side(2, 1), method="shm")


def both(theirs: str | None = "gloo", entry: Planned = ENTRY, seconds: float = 0.02) -> Result:
    """A run of refit and of Megatron-Core, which took five times as long, `theirs` what moved its bytes."""
    baseline = replace(timed([5 * seconds] * 3), transport=theirs)
    return result(entry, [seconds] * 3, baseline=baseline, device="cpu")


@pytest.fixture(params=["recorded", "older file"])
def outcome(request: pytest.FixtureRequest, tmp_path: Path) -> Outcome:
    if request.param == "recorded":
        return judged(ENTRY, both())
    content = {**json.loads(encoded(both())), "schema_version": 3}
    for engine in content["measurements"]["refit"]["engines"].values():
        del engine["transport"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return judged(ENTRY, read_result(path))


@pytest.fixture
def run(outcome: Outcome) -> Run:
    return Run(Path("logs"), sweep_of([outcome.planned]), (outcome,), is_sweep=True)


def test_headlines(outcome: Outcome) -> None:
    ours, theirs, ratio = headlines(outcome)
    assert ours.startswith("TP2 EP2 -> TP2 EP1 over shm: 20.0 ms median")
    assert theirs.startswith("TP2 EP2 -> TP2 EP1 over gloo by Megatron-Core: 100 ms median")
    assert ratio == f"Ratio: refit is 5.00 x as fast as Megatron-Core's own (median): {WAYS}"


def test_one_transport_needs_no_name() -> None:
    entry = replace(ENTRY, method="gloo")
    assert headlines(judged(entry, both(entry=entry)))[2] == (
        "Ratio: refit is 5.00 x as fast as Megatron-Core's own (median)"
    )


def test_a_baseline_of_which_it_is_not_known_gets_no_method_of_ours() -> None:
    (theirs,) = (line for line in headlines(judged(ENTRY, unknown())) if "by another" in line)
    assert "over an unknown transport by another" in theirs


def unknown() -> Result:
    made = both()
    assert made.refit is not None
    engines = {"refit": timed([0.1]), "another": EngineResult(transport=None)}
    return replace(made, measurements={"refit": replace(made.refit, engines=engines)})


def test_texts_and_tables(run: Run) -> None:
    text = summary_text(run.sweep, run.outcomes)
    assert "Method: shm" in text
    assert WAYS in text
    markdown = markdown_report(run)
    rows = [line for line in markdown.splitlines() if line.startswith("| `a`")]
    assert "| shm | refit |" in rows[0]
    assert "| gloo | Megatron-Core |" in rows[1]
    assert rows[1].endswith("| 5.00 (shm against gloo) |")
    html = page([run], [Pictures()])
    assert '<td class="text">gloo</td><td class="text">Megatron-Core</td>' in html
    assert "5.00 (shm against gloo)</td>" in html


def test_tables_for_programs(run: Run) -> None:
    ours, theirs = csv.DictReader(io.StringIO(csv_text(records([run]))))
    assert (ours["method"], ours["ratio"], ours["ratio_between"]) == ("shm", "", "")
    assert (theirs["method"], theirs["ratio"], theirs["ratio_between"]) == ("gloo", "5.0", "shm against gloo")
    assert [each["method"] for each in json.loads(json_text(records([run])))] == ["shm", "gloo"]


def test_pictures(outcome: Outcome) -> None:
    assert [bar.label for bar in bars_of(outcome)] == ["refit over shm", "Megatron-Core over gloo (baseline)"]


def test_the_table_of_a_log(outcome: Outcome) -> None:
    table = refit_lines.table(outcome.refit.engines)
    assert [line.split()[:2] for line in table.splitlines()[2:4]] == [["refit", "shm"], ["Megatron-Core", "gloo"]]


def test_the_documents(outcome: Outcome) -> None:
    header, _, found = results_text.table([outcome]).splitlines()
    cells = dict(zip(header.split(" | "), found.split(" | "), strict=True))
    assert cells["method"] == "shm"
    assert cells["Megatron-Core over"] == "gloo"
    assert cells["Megatron-Core ratio |"] == "5.00 (shm against gloo) |"


def test_the_table_of_a_matrix(outcome: Outcome) -> None:
    assert outcome.result is not None
    text = row(Cell("tiny", "a", (), 6), outcome.result)
    assert "Megatron-Core over gloo 100.0 ms, wrong 0, 5.00 x as long (shm against gloo)" in text


def test_what_stood_in_for_a_planned_method_is_named() -> None:
    """On a machine without GPUs, and with `--refit-method auto`."""
    for method in ("cuda-ipc", "auto"):
        outcome = judged(replace(ENTRY, method=method), both())
        assert outcome.method == "shm"
        assert headlines(outcome)[0].startswith("TP2 EP2 -> TP2 EP1 over shm: ")
    assert judged(replace(ENTRY, method="auto"), Result("a")).method == "auto"


def test_runs_of_two_transports_are_compared_by_name() -> None:
    gloo = replace(ENTRY, method="gloo")
    old, new = (
        Run(Path(name), sweep_of([entry], name), (judged(entry, both(entry=entry, seconds=seconds)),), is_sweep=True)
        for name, entry, seconds in (("old", gloo, 0.04), ("new", ENTRY, 0.02))
    )
    comparison = compare_runs(old, new)
    text = compare_text(old, new, comparison, 0.05)
    assert "warning: method differs: gloo / shm" in text
    (found,) = (line for line in text.splitlines() if line.startswith("a "))
    assert "gloo -> shm" in found
    assert changes.change_text(comparison.pairs[0]) == "-50.0 %, beyond spread (gloo -> shm)"
    same = compare_runs(old, old)
    assert "->" not in compare_text(old, old, same, 0.05)
    assert changes.change_text(same.pairs[0]) == "+0.0 %, within spread"


def test_the_spread_between_runs() -> None:
    runs = [judged(replace(ENTRY, name=f"a_run{number}", run_of="a"), both()) for number in (1, 2)]
    assert spread_lines(runs)[0].startswith("a over shm: 20.00 ms, median of 2 runs")


def test_separate_gpu_sets_over_another_transport() -> None:
    entries = {
        "apart": (ENTRY, 0.04),
        "shared": (planned("b", side(4, 1), side(2, 1), mode="collocated", method="gloo"), 0.02),
    }
    found = [judged(entry, result(entry, [seconds] * 3)) for entry, seconds in entries.values()]
    assert "Separate sets take 2.00 x as long per GB (shm against gloo)." in analysis_text(found)
