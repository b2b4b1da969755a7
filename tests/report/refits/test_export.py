"""Tidy tables: every row has every column, missing figures are missing, and pandas reads them as they are."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.commands import main
from refit.plan.cost import Bound
from refit.report.refits.compare import compare_runs
from refit.report.refits.entries import scenario_entries
from refit.report.refits.export import csv_text, json_text, records, sample_records
from refit.report.refits.markdown import markdown_report
from refit.results.outcomes import judged
from refit.results.refit import EngineResult, ForwardCheck, HostTraffic
from refit.results.result import Environment
from refit.results.runs import Run, find_run
from refit.results.status import Status
from tests.report.factories import ENVIRONMENT, engine, planned, result, sample, sweep_of, timed, write_result
from tests.report.refits.test_summary import ONE, full_run


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def run_with(*engines: EngineResult, **changes: Any) -> Run:
    named = dict(zip(("refit", "megatron"), engines, strict=False))
    outcome = judged(ONE, result(ONE, engines=named, **changes))
    return Run(Path("logs"), sweep_of([ONE]), (outcome,), is_sweep=True)


def test_every_row_has_every_column(tmp_path: Path) -> None:
    full_run(tmp_path)
    found = records([find_run(tmp_path)])
    assert len(found) == 11, "nine scenarios, two of them with a baseline"
    assert len({tuple(row) for row in found}) == 1
    rows = rows_of(csv_text(found))
    assert all(None not in row and None not in row.values() for row in rows)
    first, second, baseline = rows[:3]
    assert float(first["median_ms"]) == 45.21
    assert float(first["share_of_lower_bound"]) == pytest.approx(0.0434 / 0.04521)
    assert (second["engine"], second["valid"], second["local_bytes"]) == ("refit", "True", "300000000000")
    assert (baseline["engine"], baseline["valid"], baseline["num_wrong"]) == ("megatron", "False", "168")
    assert baseline["share_of_lower_bound"] == ""
    assert [row["status"] for row in rows if row["scenario"] == "wrong_weights"] == ["wrong_data", "waived"]
    refused = next(row for row in rows if row["status"] == "refused")
    assert (refused["engine"], refused["median_ms"], refused["valid"]) == ("", "", "False")


def test_times_are_in_milliseconds_and_cold_is_the_sum_of_its_parts() -> None:
    measured = replace(engine([[0.0452]] * 3), connect_s=0.25, extra_memory_bytes_per_rank=(1, None, 3))
    (row,) = records([run_with(measured)])
    assert (row["median_ms"], row["p95_ms"], row["cv"], row["num_refits"]) == (45.2, 45.2, 0.0, 3)
    cold = [row[f"cold_{part}_ms"] for part in ("plan", "prepare", "first")]
    assert (cold, row["cold_ms"], row["connect_ms"]) == ([125.0, 250.0, 500.0], 875.0, 250.0)
    assert (row["staging_bytes"], row["extra_memory_bytes"]) == (512 << 20, 3)
    assert (row["version_torch"], row["gpu"], row["model"]) == ("2.11.0", "NVIDIA H100 80GB HBM3", "kimi_k2")


def test_versions_of_all_results_are_columns_of_every_row() -> None:
    runs = [
        run_with(engine([[0.1]]), environment=replace(ENVIRONMENT, versions={"torch": "1"})),
        run_with(engine([[0.1]]), environment=Environment(versions={"nccl": "2"})),
    ]
    rows = records(runs)
    assert [(row["version_torch"], row["version_nccl"]) for row in rows] == [("1", None), (None, "2")]


def test_samples_have_a_row_per_refit_and_rank() -> None:
    entry = planned("A")
    outcome = judged(entry, result(entry, engines={"refit": engine([[0.25] * 95 + [0.5]] * 2, num_warmup=1)}))
    rows = sample_records([Run(Path("logs"), sweep_of([entry]), (outcome,), is_sweep=True)])
    assert len(rows) == 3 * 96
    assert [sum(row["warmup"] is True for row in rows), sum(row["slowest"] is True for row in rows)] == [96, 3]
    first, last = rows[0], rows[-1]
    assert (first["iteration"], first["rank"], first["ms"], first["slowest"]) == (0, 0, 250.0, False)
    assert (last["iteration"], last["rank"], last["ms"], last["slowest"]) == (2, 95, 500.0, True)
    assert [first["in_source"], first["in_destination"]] == [True, False]
    assert [last["in_source"], last["in_destination"]] == [False, True]


@pytest.mark.parametrize(
    ("ours", "theirs", "shown"),
    [
        (timed([0.1]), timed([0.2]), ("100.00", "200.00", "2.00")),
        (timed([0.1]), timed([0.2], num_wrong=1), ("100.00", "200.00 (WRONG)", "")),
        (timed([0.1], num_wrong=1), timed([0.2]), ("100.00 (WRONG)", "200.00", "")),
        (timed([0.1]), replace(timed([0.2]), status=Status.FAILED), ("100.00", "200.00 (failed)", "")),
        (
            timed([0.1]),
            replace(timed([0.2]), samples=(sample([0.2], num_compared=0),)),
            ("100.00", "200.00 (unverified)", ""),
        ),
        (timed([0.1]), replace(timed([0.2]), forward=ForwardCheck(False)), ("100.00", "200.00 (WRONG)", "")),
    ],
)
def test_no_ratio_is_formed_with_a_wrong_result(
    ours: EngineResult, theirs: EngineResult, shown: tuple[str, str, str]
) -> None:
    run = run_with(ours, theirs)
    shown_rows = [line for line in markdown_report(run).splitlines() if line.startswith("| `")]
    tested, baseline = ([cell.strip() for cell in row.split("|")] for row in shown_rows)
    assert (tested[9], baseline[9], baseline[17]) == shown
    rows = records([run])
    assert [row["ratio"] for row in rows] == [None, 2.0 if shown[2] else None]
    assert [row["median_ms"] for row in rows] == [100.0, 200.0]
    assert [row["valid"] for row in rows] == ["(" not in shown[0], "(" not in shown[1]]


def test_a_scenario_that_failed_has_no_valid_engine() -> None:
    run = run_with(timed([0.1]), status=Status.FAILED)
    (entry,) = scenario_entries(run, run.outcomes[0])
    assert not entry.is_valid
    assert "100.00 (failed)" in markdown_report(run)


def test_any_number_of_runs_is_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_run(tmp_path / "sweep")
    (tmp_path / "single").mkdir()
    write_result(tmp_path / "single" / "one.json", result(ONE))
    folders = [str(tmp_path / name) for name in ("sweep", "single")]
    assert main(["report", *folders, "--format", "csv"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 12
    assert len({(row["directory"], row["run_id"], row["scenario"], row["engine"]) for row in rows}) == 12
    assert main(["report", *folders]) == 0
    text = capsys.readouterr().out
    assert [text.count("Refit Benchmark Summary\n"), text.count("Config: one\n")] == [2, 1]
    (tmp_path / "damaged_sweep.json").write_text("{")
    assert main(["report", str(tmp_path / "damaged_sweep.json"), *folders, "--format", "json"]) == 4
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 12
    assert captured.err.startswith(f"skipped {tmp_path / 'damaged_sweep.json'}: is no sweep file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples"], "--samples is a table for programs: give --format csv or json with it"),
        (["--run-id", "a"], "--run-id names a run of one folder, 2 are given"),
    ],
)
def test_what_cannot_be_asked_together(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path), str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_pandas_reads_both_tables_in_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pandas

    full_run(tmp_path)
    frames = {}
    for form, read in (("csv", pandas.read_csv), ("json", pandas.read_json)):
        for words in ([], ["--samples"]):
            assert main(["report", str(tmp_path), "--format", form, *words]) == 0
            frames[form, bool(words)] = read(io.StringIO(capsys.readouterr().out))
    for form in ("csv", "json"):
        table, samples = frames[form, False], frames[form, True]
        assert len(table) == 11
        assert table["valid"].dtype == bool
        medians = table[table["valid"]].set_index("scenario")["median_ms"]
        assert medians.to_dict() == {ONE.name: 45.21, "TP16_EP8_to_TP8_EP16_128": 45.2}
        assert pandas.to_datetime(table["date"]).dt.year.dropna().unique().tolist() == [2026]
        slowest = samples[samples["slowest"] & ~samples["warmup"]]
        assert slowest.groupby(["scenario", "engine"])["ms"].median()[ONE.name, "refit"] == 45.21
        joined = samples.merge(table, on=["directory", "run_id", "scenario", "engine"])
        assert len(joined) == len(samples)


def test_an_empty_table_is_valid_too() -> None:
    assert csv_text(sample_records([run_with()])) == ""
    assert json.loads(json_text([])) == []


HOSTS = HostTraffic({"a": 2, "b": 2}, "node", 1_000_000_000, 2_000_000_000, 900_000_000, 4_000_000_000)


def between_hosts(relay: str = "node") -> Run:
    entry = planned("A")
    measured = result(entry, engines={"refit": engine([[0.25] * 96] * 3)})
    refit = replace(
        measured.measurements["refit"],  # type: ignore[type-var]
        hosts=replace(HOSTS, relay=relay),
        floor=Bound("example", 0.04, "node 1 receives"),
    )
    outcome = judged(entry, replace(measured, measurements={"refit": refit}))
    return Run(Path("logs"), sweep_of([entry]), (outcome,), is_sweep=True)


def test_rows_between_hosts_have_what_crossed_and_the_floor() -> None:
    (row,) = records([between_hosts()])
    assert (row["relay"], row["floor_ms"]) == ("node", 40.0)
    assert (row["between_hosts_bytes"], row["within_hosts_bytes"]) == (1_000_000_000, 2_000_000_000)
    assert (row["direct_between_bytes"], row["least_between_bytes"]) == (4_000_000_000, 900_000_000)
    (alone,) = records([run_with(engine([[0.1]]))])
    assert (alone["relay"], alone["floor_ms"], alone["between_hosts_bytes"]) == (None, None, None)


def test_the_table_has_columns_between_hosts_where_there_are_several() -> None:
    titles = ("relay", "between hosts (GB)", "without relay", "in every plan", "within hosts (GB)", "floor (ms)")
    text = markdown_report(between_hosts())
    assert all(f" {title} " in text for title in titles)
    assert "| node |" in text
    assert "| 1.000 | 4.000 | 0.900 | 2.000 |" in text
    assert not any(title in markdown_report(run_with(engine([[0.1]]))) for title in titles)


def test_a_comparison_says_that_the_relay_differs() -> None:
    warnings = compare_runs(between_hosts("off"), between_hosts("node")).warnings
    assert warnings == ("relay differs: off (1.00 GB between hosts) / node (1.00 GB between hosts)",)
