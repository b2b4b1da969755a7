"""The documents' tables are those that the files of docs/results give, their lists of fields those of the types."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

from docs.tables import fields
from docs.tables import refits as results_text
from docs.tables.__main__ import BLOCK, RESULTS, ROOT, differences, documents
from refit.config.quantisation import Quantisation
from refit.errors import UsageError
from refit.results.collection import write_collection
from refit.results.outcomes import Outcome, judged
from refit.results.refit import EngineResult, QuantisedRefit
from refit.results.result import Failure
from refit.results.status import Status
from refit.results.step import Breakdown
from tests.report.factories import ENVIRONMENT, planned, result, side, timed
from tests.report.steps.test_dispatchers import outcome as dispatched
from tests.report.steps.test_trainers import outcome as trained

MAX_FILE_BYTES = 3 << 19


def test_the_documents_are_what_the_result_files_give() -> None:
    assert list(differences(ROOT)) == []


def test_result_files_are_small_and_used() -> None:
    files = sorted((ROOT / RESULTS).glob("*.jsonl"))
    assert files
    assert sum(path.stat().st_size for path in (ROOT / RESULTS).rglob("*.jsonl")) < MAX_FILE_BYTES
    assert {path.stem for path in files} == {
        block["name"]
        for path in documents(ROOT)
        for block in BLOCK.finditer(path.read_text())
        if block["made_of"] == "results"
    }


def test_figures_of_the_readme_are_on_the_pages_that_its_rows_name() -> None:
    rows = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and "](docs/" in line
    ]
    figures = 0
    for cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows):
        target = re.search(r"\]\((docs/[^)#]+)", cells[0])
        if target is None or len(cells) != 6:
            continue
        page = (ROOT / target[1]).read_text()
        for figure in re.findall(r"\d[\d,.]*(?= ms)", " ".join(cells[1:3])):
            assert figure in page, f"{figure} is not in {target[1]}"
            figures += 1
    assert figures >= 6


def copied(root: Path) -> Path:
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copy(ROOT / "README.md", root)
    return root


def test_a_changed_figure_is_found_and_mended(tmp_path: Path) -> None:
    root = copied(tmp_path)
    page = root / "docs/performance.md"
    true = page.read_text()
    page.write_text(true.replace("elements compared over", "elements seen over"))
    assert list(differences(root)) == ["docs/performance.md is not what its result files or types give"]
    assert documents(root)[page] == true


def test_a_changed_field_is_found_and_mended(tmp_path: Path) -> None:
    root = copied(tmp_path)
    page = root / "docs/fields.md"
    true = page.read_text()
    page.write_text(true.replace("| `median_s` | seconds |", "| `median_ms` | milliseconds |"))
    assert list(differences(root)) == ["docs/fields.md is not what its result files or types give"]
    assert documents(root)[page] == true


def test_every_type_of_a_result_has_a_table() -> None:
    titles = re.findall(r"^## (\w+)", fields.section("result"), re.MULTILINE)
    assert {"Result", "RefitResult", "EngineResult", "Sample", "SideSpec", "Layout", "Summary"} <= types_of(
        outcomes()[0].result
    )
    assert types_of(outcomes()[0].result) - {*titles} == set()
    assert len(titles) == len({*titles})


def types_of(value: object) -> set[str]:
    """The names of the dataclasses that `value` is made of."""
    if isinstance(value, (dict, list, tuple)):
        return {name for each in (value.values() if isinstance(value, dict) else value) for name in types_of(each)}
    if not is_dataclass(value):
        return set()
    return {type(value).__name__, *types_of([getattr(value, each.name) for each in dataclasses.fields(value)])}


def test_a_field_has_its_unit_its_type_and_its_meaning() -> None:
    rows = fields.section("result").splitlines()
    assert "| `connect_s` | seconds, null | Connections, once per process and before a cold refit: " in "\n".join(rows)
    assert "| `local_by_rank` | object of bytes | Of every destination rank. |" in rows
    assert "| `verify` | `full`, `sample`, `off` |  |" in rows
    (zero,) = (row for row in rows if row.startswith("| `zero_stage`"))
    assert zero.endswith("| ZeRO stage, 0 to 2; default: 1 (`--zero-stage`) |")


def made_from(root: Path, name: str, found: Sequence[Outcome], commit: str = "abc1234") -> str:
    """What a document with marks of `name` becomes, with these results in its file."""
    results = []
    for number, one in enumerate(found):
        assert one.result is not None
        environment = replace(one.result.environment or ENVIRONMENT, commit=commit)
        results.append(replace(one.result, run_id=str(number), environment=environment))
    (root / RESULTS).mkdir(parents=True, exist_ok=True)
    write_collection(root / RESULTS / f"{name}.jsonl", results)
    page = root / "docs/page.md"
    page.write_text(f"Before\n\n<!-- results: {name} -->\n<!-- end of results: {name} -->\n")
    return documents(root)[page]


def test_new_results_are_a_table_with_their_commit(tmp_path: Path) -> None:
    text = made_from(tmp_path, "gpu4_speed", [one for one in outcomes() if one.result])
    assert text.startswith("Before\n\n<!-- results: gpu4_speed -->\n\n")
    assert ", commit abc1234. Versions: " in " ".join(text.split())
    assert "| another ms |" in text


def test_results_of_no_clean_commit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gpu4_speed.jsonl: 0 was measured at abc1234-dirty, not at a clean"):
        made_from(tmp_path, "gpu4_speed", outcomes()[:1], "abc1234-dirty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: gpu4_speed -->\n", "1 marks of results or fields begin, 0 end"),
        ("<!-- results: gpu4_speed -->\n<!-- end of results: gpu4_speed -->", "there is no docs/results/gpu4_speed"),
        ("<!-- results: gpu4_rumour -->\n<!-- end of results: gpu4_rumour -->", "rumour is none of speed, fp8"),
        ("<!-- fields: rumour -->\n<!-- end of fields: rumour -->", "fields rumour: it is none of result"),
    ],
)
def test_marks_without_a_file_a_kind_or_an_end_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UsageError, match=message):
        documents(tmp_path)


def test_dispatchers_have_a_table_once_they_are_measured(tmp_path: Path) -> None:
    cells = [
        dispatched(arm, mean_s, micro) for micro, mean_s in ((1, 2.0), (4, 1.0)) for arm in ("alltoall", "allgather")
    ]
    cells += [dispatched("alltoall", 1.0, 2), dispatched("allgather", 0.5, 2, losses=(5.0, 4.0, 3.1))]
    cells.append(dispatched("alltoall", 1.5, overlap=True))
    text = made_from(tmp_path, "gpu4_dispatchers", cells)
    assert (
        "| TP1 EP2 | 4 | alltoall | 1000.0 | allgather | 1000.0 | +0.0 | within the spread | 0.0e+00 | equal |" in text
    )
    assert "| NOT EQUAL: losses differ by 3.3e-02, more than 4.1e-04 |" in text
    assert "| TP1 EP2 | 1 | allgather | 2000.0 | 0.25 |" in text
    assert "| TP1 EP2 | 1 | alltoall, overlap | 1500.0 |" in text  # which no other dispatcher ran with
    assert "| rest | route |" in text  # no step was recorded
    cells[:2] = with_breakdowns(cells[:2])
    text = made_from(tmp_path, "gpu4_dispatchers", cells)
    assert "| peak GiB | forward | backward | forward and backward | optimizer | rest | route |" in text
    assert re.search(r"\| TP1 EP2 \| 1 \| alltoall \| .* \| 50.0 \| 25.0 \|  \| 12.5 \| 12.5 \| 10.0 \|", text)
    assert re.search(r"\| TP1 EP2 \| 1 \| allgather \| .* \|  \|  \| 75.0 \| 12.5 \| 12.5 \| 10.0 \|", text)
    assert "| allgather |" not in made_from(tmp_path, "gpu4_dispatchers", cells[:1])


def test_layouts_have_a_table_once_they_have_run(tmp_path: Path) -> None:
    found = [one for one in outcomes() if one.result]
    made = made_from(tmp_path, "gpu1_layouts", found)
    assert "| formats | layouts | bf16 | fp8-block | mxfp8 | collocated | TP changes |" in made
    assert f"| megatron -> megatron | {len(found)} | {len(found)} | 0 | 0 |" in made


def test_trainers_have_a_table_once_they_are_measured(tmp_path: Path) -> None:
    cells = [
        trained("megatron", 2.0),
        trained("megatron", 1.6, impl="transformer_engine"),
        trained("fsdp2", 2.0),
        trained("autotp", 2.4, loss=5.1),
    ]
    rows = (
        "| TP2 DP2 | megatron TP2 EP1 TE | 1600.0 | +0.0 | 320 | 0.625 | 3.0 | 0.0e+00 | equal |",
        "|  | megatron TP2 EP1 | 2000.0 | +25.0 | 256 | 0.5 | 3.0 | 0.0e+00 | equal |",
        "|  | autotp TP2 DP2 ZeRO2 | 2400.0 | - | 213 | 0.4167 | 3.0 | 2.1e-02 | NOT EQUAL: losses ",
        "| TP2 DP2 | megatron TP2 EP1 TE | 50.0 | 25.0 | 12.5 | - | 12.5 |",
    )
    text = made_from(tmp_path, "gpu2_trainers", cells)
    assert [row for row in rows if row not in text] == []
    assert "8 sequences of 64 tokens, 1 at a time" in " ".join(text.split())
    assert "| megatron TP2 EP1 TE |" not in made_from(tmp_path, "gpu2_trainers", cells[1:2])


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
