"""What an attempt that could not finish its own result is said to have died of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refit.results.sweep import Attempt, attempts, next_attempt
from refit.sweep.close import Ending, close, telling_line

TORCHRUN = """
error: nvshmem4py is not installed: pip install nvshmem4py-cu13
E1121 04:00:00.000000 12 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: {code}) local_rank: 3
============================================================
benchmark_refit.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : {time}
  host      : node1
  rank      : 9 (local_rank: 1)
  exitcode  : 1 (pid: 99)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : {time}
  host      : node1
  rank      : {rank} (local_rank: 3)
  exitcode  : {code} (pid: 12)
  error_file: <N/A>
============================================================
"""


def attempt(tmp_path: Path, log: str | None = None, result: str | None = None) -> Attempt:
    found = next_attempt(tmp_path, "run", "a")
    if log is not None:
        found.log.write_text(log)
    if result is not None:
        found.json.write_text(result)
    return found


def message(tmp_path: Path, ending: Ending, log: str | None = None, result: str | None = None) -> str:
    closed = attempt(tmp_path, log, result)
    content = close(closed, ending)
    assert content == json.loads(closed.json.read_text())
    assert (content["status"], content["exit_code"]) == ("failed", 4)
    return str(content["failure"]["message"])


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    running = {"schema_version": 2, "status": "running", "engines": {"refit": {"samples": [1, 2]}}}
    closed = attempt(tmp_path, "# header\nslurmstepd: error: Killed\n", json.dumps(running))
    content = close(closed, Ending(137))
    assert content["engines"] == running["engines"]
    assert content["failure"]["message"] == "ended with exit code 137 (killed by signal 9): slurmstepd: error: Killed"
    assert content["finished"]


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        ("ok", Ending(124, timed_out_s=3)),
        ("wrong_data", Ending(124, timed_out_s=3)),
        ("waived", Ending(143, cancelled=True)),
        ("failed", Ending(1)),
    ],
)
def test_a_result_that_says_how_it_ended_stays(tmp_path: Path, status: str, ending: Ending) -> None:
    text = json.dumps({"status": status, "exit_code": 1})
    closed = attempt(tmp_path, "error: x", text)
    assert close(closed, ending) == {"status": status, "exit_code": 1}
    assert closed.json.read_text() == text


def test_a_run_that_was_told_to_stop_is_said_to_have_ended_from_outside(tmp_path: Path) -> None:
    failure = {"rank": 1, "phase": "refit iteration 3: wire", "message": "was told to stop (SIGTERM)"}
    told = attempt(tmp_path, "x", json.dumps({"status": "failed", "exit_code": 4, "failure": failure}))
    expected = {"rank": None, "phase": "refit iteration 3: wire", "message": "timed out after 3 s"}
    assert close(told, Ending(124, timed_out_s=3))["failure"] == expected


def test_a_sweep_that_is_cancelled_says_so(tmp_path: Path) -> None:
    assert message(tmp_path, Ending(143, cancelled=True), "x\n") == "cancelled"


def test_a_limit_that_was_run_into_is_given(tmp_path: Path) -> None:
    assert message(tmp_path, Ending(143, timed_out_s=600), "refit 1/5\n") == "timed out after 600 s"


def test_the_line_that_tells(tmp_path: Path) -> None:
    log = "error: the first\nerror: 8 + 4 = 12 GPUs needed\nsrun: error: task 0: Exited with exit code 2\nbye\n\n"
    assert message(tmp_path, Ending(2), log) == "ended with exit code 2: 8 + 4 = 12 GPUs needed"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ""),
        (["", "  "], ""),
        (["one", "two", ""], "two"),
        (["FAILED: rank 3 failed", "more"], "rank 3 failed"),
        (["[rank0]: error: no", "x"], "no"),
        (["  3: FAILED: no", "3: x"], "no"),
    ],
)
def test_telling_lines(lines: list[str], expected: str) -> None:
    assert telling_line(lines) == expected


def test_no_log_and_an_empty_result(tmp_path: Path) -> None:
    assert message(tmp_path, Ending(1), None, "") == "ended with exit code 1: the log is empty"


def test_the_rank_that_failed_first_is_named(tmp_path: Path) -> None:
    log = TORCHRUN.format(time="2026-01-26_15:30:09", rank=40, code=1)
    log += TORCHRUN.format(time="2026-01-26_15:30:02", rank=3, code=-9)
    closed = attempt(tmp_path, log)
    failure = close(closed, Ending(1))["failure"]
    assert failure["rank"] == 3
    assert failure["message"].startswith("ended with exit code -9 (killed by signal 9): nvshmem4py is not installed")


def test_a_missing_transport_is_waived_also_behind_torchrun(tmp_path: Path) -> None:
    direct = close(attempt(tmp_path, "error: nvshmem4py is not installed: pip install it\n"), Ending(3))
    behind = close(attempt(tmp_path, TORCHRUN.format(time="2026-01-26_15:30:09", rank=0, code=3)), Ending(1))
    assert (direct["status"], direct["exit_code"]) == (behind["status"], behind["exit_code"]) == ("waived", 3)
    assert direct["failure"]["rank"] is behind["failure"]["rank"] is None
    assert direct["failure"]["message"] == "nvshmem4py is not installed: pip install it"
    assert close(attempt(tmp_path, "x"), Ending(3, cancelled=True))["status"] == "failed"


def test_attempts_are_counted_and_never_reused(tmp_path: Path) -> None:
    assert attempts(tmp_path, "run", "a") == []
    first = attempt(tmp_path, "x")
    assert first.log.name == "run_a.log"
    second = next_attempt(tmp_path, "run", "a")
    assert second.json.name == "run_a.2.json"
    second.ranks.mkdir()
    assert next_attempt(tmp_path, "run", "a").stem.name == "run_a.3"
    assert attempts(tmp_path, "run", "a") == [first, second]
    assert next_attempt(tmp_path, "run", "b").stem.name == "run_b"
