"""One verdict: whatever is wrong with a refit, every report says so, and the exit codes too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from refit.errors import ExitCode
from refit.report.refits import refit_lines
from refit.report.refits.compare import compare_runs, compare_text, exit_code
from refit.report.refits.entries import entries_of
from refit.report.refits.headline import headlines
from refit.report.refits.summary import summary_text
from refit.results.outcomes import judged
from refit.results.refit import EngineResult, ForwardCheck
from refit.results.result import Result
from refit.results.runs import find_run
from refit.results.status import Status
from tests.report.factories import planned, result, side, sweep_of, timed, write_run

ENTRY = planned("deep", side(1, 1), side(1, 1))
FAULT = "forward check failed at layer 5: 69 % of tokens agree"
FAILED = ForwardCheck(False, agreement=0.69, first_wrong="layer 5")
RIGHT = timed([0.1, 0.1, 0.1])
WRONG = {
    "elements": (timed([0.1, 0.1, 0.1], num_wrong=7), "28 of 4,000,000 elements wrong"),
    "forward": (replace(RIGHT, forward=FAILED), FAULT),
    "trained": (replace(RIGHT, trained=FAILED), f"{FAULT} after training"),
    "both": (replace(timed([0.1], num_wrong=7), forward=FAILED), f"14 of 2,000,000 elements wrong; {FAULT}"),
}
"""The engine's status is that of files of earlier versions: ok where only the forward check failed."""


def run_of(engine: EngineResult, status: Status = Status.WRONG_DATA) -> Result:
    return result(ENTRY, engines={"refit": engine}, status=status, exit_code=int(status.exit_code))


@pytest.mark.parametrize(("engine", "fault"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("recorded", [Status.WRONG_DATA, Status.OK], ids=["recorded", "earlier"])
def test_every_report_says_that_a_refit_is_wrong(
    engine: EngineResult, fault: str, recorded: Status, tmp_path: Path
) -> None:
    found = run_of(engine, recorded)
    outcome = judged(ENTRY, found)
    assert (engine.verdict, engine.doubt, engine.fault) == (Status.WRONG_DATA, "WRONG", fault)
    assert (outcome.status, outcome.reason) == (Status.WRONG_DATA, fault)
    (line,) = headlines(outcome)
    assert ": WRONG; " in line
    assert all(part in line for part in engine.wrong_passes)
    assert refit_lines.table({"refit": engine}).rstrip().endswith("wrong data")
    verdict = refit_lines.verdict("refit", engine, "full")
    assert verdict.startswith("FAILED (refit): ")
    assert all(part in verdict for part in engine.wrong_passes)
    sweep = sweep_of([ENTRY])
    text = summary_text(sweep, [outcome])
    assert f"WRONG DATA: {fault}" in text
    assert "Verification: FAILED" in text
    assert text.endswith("1 scenario: 1 wrong data")
    run = find_run(write_run(tmp_path / "new", sweep, {"deep": found}))
    (entry,) = entries_of([run])
    assert (entry.status, entry.reason, entry.is_valid) == (Status.WRONG_DATA, fault, False)
    before = find_run(write_run(tmp_path / "old", sweep, {"deep": run_of(RIGHT, Status.OK)}))
    comparison = compare_runs(before, run)
    assert exit_code(before, run, comparison, 0.05) == ExitCode.WRONG_DATA
    assert f"WRONG DATA in new: deep: {fault}" in compare_text(before, run, comparison, 0.05)


def test_a_right_refit_is_right_everywhere() -> None:
    engine = replace(RIGHT, forward=ForwardCheck(True, agreement=1.0))
    outcome = judged(ENTRY, run_of(engine, Status.OK))
    assert (engine.verdict, engine.doubt, engine.fault, outcome.status) == (Status.OK, None, None, Status.OK)
    assert refit_lines.verdict("refit", engine, "full").startswith("PASSED")


def test_a_wrong_pass_is_no_matter_of_what_verify_compares() -> None:
    engine = replace(RIGHT, samples=tuple(replace(each, num_compared=0) for each in RIGHT.samples), forward=FAILED)
    assert refit_lines.verdict("refit", engine, "off") == (
        f"FAILED (refit): --verify off, no element was compared; {FAULT}"
    )
    outcome = judged(ENTRY, run_of(engine))
    assert "Verification: FAILED" in summary_text(sweep_of([ENTRY]), [outcome])


def test_a_wrong_baseline_is_marked_and_does_not_decide() -> None:
    both = {"refit": RIGHT, "megatron": replace(RIGHT, forward=FAILED)}
    outcome = judged(ENTRY, result(ENTRY, engines=both))
    assert outcome.status is Status.OK
    lines = headlines(outcome)
    assert "WRONG" not in lines[0]
    assert ": WRONG; " in lines[1]
    assert "is WRONG" in lines[2], "in place of a ratio"


def test_wrong_after_the_experts_moved_is_the_reason() -> None:
    found = run_of(RIGHT)
    assert found.refit is not None
    moved = replace(found.refit, engines={"refit": replace(RIGHT, forward=FAILED)})
    changed = replace(found, measurements={"refit": replace(found.refit, rearranged=moved)})
    assert judged(ENTRY, changed).reason == f"after the experts were placed anew, {FAULT}"
