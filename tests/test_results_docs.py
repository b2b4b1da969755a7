"""The documents' tables and the README's picture are those that the files of docs/results give."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from docs.tables import __main__ as results_docs
from docs.tables import refits as results_text
from docs.tables.__main__ import (
    BLOCKS,
    OPENING,
    PICTURE,
    RESULTS,
    ROOT,
    TRAINERS,
    differences,
    documents,
    draw_opening,
)
from refit.config.quantisation import Quantisation
from refit.results.collection import write_collection
from refit.results.outcomes import Outcome, judged
from refit.results.refit import EngineResult, QuantisedRefit
from refit.results.result import Failure
from refit.results.status import Status
from refit.results.step import Breakdown
from tests.report.factories import planned, result, side, timed
from tests.report.steps.test_dispatchers import outcome as dispatched
from tests.report.steps.test_trainers import outcome as trained

MAX_FILE_BYTES = 3 << 19


def test_the_documents_are_what_the_result_files_give() -> None:
    assert list(differences(ROOT)) == []


def test_result_files_are_small_and_used() -> None:
    files = sorted((ROOT / RESULTS).glob("*.jsonl"))
    assert files
    assert sum(path.stat().st_size for path in files) < MAX_FILE_BYTES
    assert {path.stem for path in files} <= {name for block in BLOCKS for name in block.files}


def copied(root: Path) -> Path:
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copy(ROOT / "README.md", root)
    return root


def test_a_changed_figure_is_found_and_mended(tmp_path: Path) -> None:
    root = copied(tmp_path)
    page = root / "docs/performance.md"
    true = page.read_text()
    page.write_text(true.replace("elements compared over", "elements seen over"))
    assert list(differences(root)) == ["docs/performance.md is not what its result files give"]
    assert documents(root)[page] == true


def test_new_results_change_the_documents_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    root = copied(tmp_path)
    for name in OPENING:
        (root / RESULTS / f"{name}.jsonl").unlink(missing_ok=True)
    write_collection(root / RESULTS / "gpu4_speed.jsonl", [one.result for one in outcomes() if one.result])
    assert len(list(differences(root))) == 3
    for path, text in documents(root).items():
        path.write_text(text)
    draw_opening(root)
    assert list(differences(root)) == []
    readme = (root / "README.md").read_text()
    assert PICTURE.as_posix() in readme
    assert "takes 45.2 ms over nvshmem, 88 % of" in " ".join(readme.split())
    assert "another" in (root / "docs/performance.md").read_text()


def test_dispatchers_have_a_table_once_they_are_measured(tmp_path: Path) -> None:
    root = copied(tmp_path)
    cells = [
        dispatched(arm, mean_s, micro) for micro, mean_s in ((1, 2.0), (4, 1.0)) for arm in ("alltoall", "allgather")
    ]
    cells += [dispatched("alltoall", 1.0, 2), dispatched("allgather", 0.5, 2, losses=(5.0, 4.0, 3.1))]
    cells.append(dispatched("alltoall", 1.5, overlap=True))
    file = root / RESULTS / "gpu4_dispatchers.jsonl"
    write_collection(file, [replace(one.result, run_id=one.planned.name) for one in cells if one.result])
    page = root / "docs/performance.md"
    pair = "| TP1 EP2 | 4 | alltoall | 1000.0 | allgather | 1000.0 | +0.0 | within the spread | 0.0e+00 | equal |"
    assert pair not in page.read_text()
    text = documents(root)[page]
    assert pair in text
    assert "| NOT EQUAL: losses differ by 3.3e-02, more than 4.1e-04 |" in text
    assert "| TP1 EP2 | 1 | allgather | 2000.0 | 0.25 |" in text
    assert "| TP1 EP2 | 1 | alltoall, overlap | 1500.0 |" in text  # which no other dispatcher ran with
    assert "| rest | route |" in text  # no step was recorded
    cells[:2] = with_breakdowns(cells[:2])
    write_collection(file, [replace(one.result, run_id=one.planned.name) for one in cells if one.result])
    text = documents(root)[page]
    assert "| peak GiB | forward | backward | forward and backward | optimizer | rest | route |" in text
    assert re.search(r"\| TP1 EP2 \| 1 \| alltoall \| .* \| 50.0 \| 25.0 \|  \| 12.5 \| 12.5 \| 10.0 \|", text)
    assert re.search(r"\| TP1 EP2 \| 1 \| allgather \| .* \|  \|  \| 75.0 \| 12.5 \| 12.5 \| 10.0 \|", text)
    write_collection(file, [replace(cells[0].result, run_id="alone")] if cells[0].result else [])
    assert "| allgather |" not in documents(root)[page]


def test_layouts_have_a_table_once_they_have_run(tmp_path: Path) -> None:
    root = copied(tmp_path)
    file, page = root / RESULTS / "gpu1_layouts.jsonl", root / "docs/performance.md"
    file.unlink(missing_ok=True)
    found = [one.result for one in outcomes() if one.result]
    write_collection(file, found)
    made = documents(root)[page]
    assert "| formats | layouts | bf16 | fp8-block | mxfp8 | collocated | TP changes |" in made
    assert f"| megatron -> megatron | {len(found)} | {len(found)} | 0 | 0 |" in made


def test_trainers_have_a_table_once_they_are_measured(tmp_path: Path) -> None:
    root = copied(tmp_path)
    for name in TRAINERS:
        (root / RESULTS / f"{name}.jsonl").unlink(missing_ok=True)
    cells = {
        "local": trained("megatron", 2.0),
        "te": trained("megatron", 1.6, impl="transformer_engine"),
        "fsdp2": trained("fsdp2", 2.0),
        "autotp": trained("autotp", 2.4, loss=5.1),
    }
    file, page = root / RESULTS / "gpu2_trainers.jsonl", root / "docs/performance.md"
    rows = (
        "| TP2 DP2 | megatron TP2 EP1 TE | 1600.0 | +0.0 | 320 | 0.625 | 3.0 | 0.0e+00 | equal |",
        "|  | megatron TP2 EP1 | 2000.0 | +25.0 | 256 | 0.5 | 3.0 | 0.0e+00 | equal |",
        "|  | autotp TP2 DP2 ZeRO2 | 2400.0 | - | 213 | 0.4167 | 3.0 | 2.1e-02 | NOT EQUAL: losses ",
        "| TP2 DP2 | megatron TP2 EP1 TE | 50.0 | 25.0 | 12.5 | - | 12.5 |",
    )
    before = documents(root)[page]
    assert [row for row in rows if row in before] == []
    write_collection(file, [replace(one.result, run_id=name) for name, one in cells.items() if one.result])
    text = documents(root)[page]
    assert [row for row in rows if row not in text] == []
    assert "8 sequences of 64 tokens, 1 at a time" in " ".join(text.split())
    write_collection(file, [replace(cells["te"].result, run_id="alone")] if cells["te"].result else [])
    assert "| megatron TP2 EP1 TE |" not in documents(root)[page]


def with_breakdowns(cells: list[Outcome]) -> list[Outcome]:
    """The first cell with forward and backward apart, the second with both together."""
    found = []
    for cell, parts in zip(cells, ({"forward": 0.5, "backward": 0.25}, {"forward and backward": 0.75}), strict=True):
        assert cell.result is not None
        assert cell.train_step is not None
        breakdown = Breakdown(1.0, 0, {**parts, "optimizer": 0.125}, 0.125, {"route forward": 0.1})
        steps = replace(cell.train_step, breakdown=breakdown)
        found.append(replace(cell, result=replace(cell.result, measurements={"train-step": steps})))
    return found


def outcomes() -> list[Outcome]:
    """A case over two methods with two baselines, one of which no registry knows; a wrong one; one that failed."""
    fast, slow = (planned(name, side(1, 2), side(1, 2), method=name) for name in ("nvshmem", "nccl"))
    other, failed = planned("other", side(2, 1), side(1, 1)), planned("failed", side(4, 1), side(1, 1))
    two = {"megatron": timed([0.0904] * 3), "another": timed([0.0565] * 3)}
    waived = EngineResult(Status.WAIVED, "needs NCCL 2.30")
    return [
        judged(fast, result(fast, bound_s=0.04, engines={"refit": timed([0.0452] * 3), **two})),
        judged(slow, result(slow, bound_s=0.04, engines={"refit": timed([0.0565] * 3), **two})),
        judged(
            other,
            result(other, engines={"refit": timed([0.02]), "megatron": timed([0.01], num_wrong=7), "another": waived}),
        ),
        judged(failed, result(failed, status=Status.FAILED, measurements={}, failure=Failure("killed"))),
    ]


def test_a_table_has_columns_for_every_baseline() -> None:
    header, _, *rows = results_text.table(outcomes()).splitlines()
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    cells = [dict(zip(titles, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]
    assert [row["method"] for row in cells] == ["nvshmem", "nccl", "nvshmem", "nvshmem"]
    assert cells[0]["case"] == "TP1 EP2 -> TP1 EP2 (2+2)"
    assert cells[1]["case"] == ""
    assert [row["another ratio"] for row in cells] == ["1.25", "noise", "", ""]
    assert [row["Megatron-Core ratio"] for row in cells] == ["2.00", "1.60", "", ""]
    assert cells[2]["Megatron-Core ms"] == "10.00 (WRONG)"
    assert cells[2]["Megatron-Core #wrong"] == "14 of 2,000,000"
    assert cells[2]["another ms"] == "waived"
    assert cells[3]["ms"] == "failed"


def quantised(label: str, times_s: list[float], blocks: tuple[int, int], hidden_s: float = 0.0) -> Outcome:
    """A refit of one case into FP8."""
    spec = replace(side(1, 2), quantisation=Quantisation("fp8-block", "amax"))
    entry, tested = planned(label, side(1, 2), spec, method="cuda-ipc"), timed(times_s)
    tested = replace(
        tested,
        samples=tuple(replace(each, beside_s={"quantise": hidden_s} if hidden_s else {}) for each in tested.samples),
    )
    made = result(entry, bound_s=0.029, engines={"refit": tested})
    assert made.refit is not None
    how = QuantisedRefit("fp8-block", "128x128", "amax", "slime", (), 22, 14, *blocks, {})
    return judged(entry, replace(made, measurements={"refit": replace(made.refit, quantised=how)}))


def test_a_quantised_table_compares_with_bf16_of_the_same_case() -> None:
    entry = planned("bf16", side(1, 2), side(1, 2), method="cuda-ipc")
    plain = judged(entry, result(entry, bound_s=0.046, engines={"refit": timed([0.0476, 0.0477, 0.0478])}))
    found = [
        plain,
        quantised("source", [0.0300, 0.0301, 0.0302], (320, 0), hidden_s=0.0061),
        quantised("destination", [0.0470, 0.0477, 0.0484], (0, 320)),
        quantised("both", [0.0318] * 3, (240, 80)),
    ]
    header, _, *rows = results_text.quantised_table(found).splitlines()
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    cells = [dict(zip(titles, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]
    assert [row["case"] for row in cells] == ["TP1 EP2 -> TP1 EP2 (2+2)", "", "", ""]
    assert [row["destination"] for row in cells] == [
        "BF16",
        "fp8-block, at the source",
        "fp8-block, at the destination",
        "fp8-block, 75 % at the source",
    ]
    assert [row["x as fast as BF16"] for row in cells] == ["", "1.58", "noise", "1.50"]
    assert [row["hidden ms"] for row in cells] == ["", "6.1", "", ""]
    assert [row["% of bound"] for row in cells] == ["96", "96", "61", "91"]


def test_a_section_gives_the_reasons() -> None:
    text = results_text.section(outcomes())
    assert "- `failed` failed: killed" in text
    assert "*noise*: no ratio" in text
    assert "- another waived, needs NCCL 2.30: 1 of 4 rows" in text


def test_a_summary_ranges_over_the_fastest_of_each_case() -> None:
    text = " ".join(results_text.summary(outcomes()).split())
    assert "(nvshmem)" in text
    assert "Megatron-Core takes 2.00 x as long" in text


def test_a_ratio_within_the_noise_is_not_quoted() -> None:
    entry = planned("nvshmem", side(1, 2), side(1, 2))
    noisy = judged(entry, result(entry, engines={"refit": timed([0.1, 0.2, 0.3]), "megatron": timed([0.6] * 3)}))
    assert "takes 200 ms over nvshmem" in results_text.opening([noisy], "x.png")
    assert "Megatron" not in results_text.opening([noisy], "x.png")


def test_an_opening_without_a_valid_result_is_refused() -> None:
    with pytest.raises(ValueError, match="no result"):
        results_text.opening(outcomes()[3:], "x.png")


def test_marks_have_to_be_there_once() -> None:
    with pytest.raises(ValueError, match="marks of a"):
        results_docs.replaced("text", "a", "new")
