"""How an attempt ended that could not finish its own result."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.results.result import Failure, Result, encoded, read_result
from refit.results.status import Status
from refit.results.sweep import Attempt, attempts, next_attempt
from refit.sweep.close import Ending, close, telling_line
from tests.report.factories import planned
from tests.report.factories import result as result_of

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


def attempt(tmp_path: Path, log: str | None = None, result: Result | None = None) -> Attempt:
    """The next attempt at scenario `a`, with these files."""
    found = next_attempt(tmp_path, "run", "a")
    if log is not None:
        found.log.write_text(log)
    if result is not None:
        found.json.write_text(encoded(result))
    return found


def failure(closed: Attempt, ending: Ending) -> Failure:
    """The failure that `close` notes. The file has the result that `close` returns."""
    result = close(closed, ending)
    assert result == read_result(closed.json)
    assert (result.status, result.exit_code) == (Status.FAILED, 4)
    assert result.failure is not None
    return result.failure


def message(tmp_path: Path, ending: Ending, log: str | None = None) -> str:
    return failure(attempt(tmp_path, log), ending).message


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    running = result_of(planned("a"), status=Status.RUNNING, exit_code=None)
    closed = attempt(tmp_path, "# header\nslurmstepd: error: Killed\n", running)
    noted = failure(closed, Ending(137))
    assert noted == Failure("ended with exit code 137 (killed by signal 9): slurmstepd: error: Killed")
    result = read_result(closed.json)
    assert result.measurements == running.measurements
    assert result.finished


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (Status.OK, Ending(124, timed_out_s=3)),
        (Status.WRONG_DATA, Ending(124, timed_out_s=3)),
        (Status.WAIVED, Ending(143, cancelled=True)),
        (Status.FAILED, Ending(1)),
    ],
)
def test_a_result_that_says_how_it_ended_stays(tmp_path: Path, status: Status, ending: Ending) -> None:
    result = Result("run_a", status=status, exit_code=1)
    closed = attempt(tmp_path, "error: x", result)
    text = closed.json.read_text()
    assert close(closed, ending) == result
    assert closed.json.read_text() == text


def test_a_run_that_was_told_to_stop_is_said_to_have_ended_from_outside(tmp_path: Path) -> None:
    phase = "refit iteration 3: wire"
    stopped = Result(
        "run_a", status=Status.FAILED, exit_code=4, failure=Failure("was told to stop (SIGTERM)", 1, phase)
    )
    told = attempt(tmp_path, "x", stopped)
    assert failure(told, Ending(124, timed_out_s=3)) == Failure("timed out after 3 s", None, phase)


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
    closed = attempt(tmp_path)
    closed.json.touch()
    assert failure(closed, Ending(1)).message == "ended with exit code 1: the log is empty"


def test_the_rank_that_failed_first_is_named(tmp_path: Path) -> None:
    log = TORCHRUN.format(time="2026-01-26_15:30:09", rank=40, code=1)
    log += TORCHRUN.format(time="2026-01-26_15:30:02", rank=3, code=-9)
    noted = failure(attempt(tmp_path, log), Ending(1))
    assert noted.rank == 3
    assert noted.message.startswith("killed on node1 by signal 9 (SIGKILL): most likely the kernel")


def test_the_signal_is_added_to_what_the_ranks_have_noticed(tmp_path: Path) -> None:
    gone = Failure("died or was killed (it stopped answering)", 3, "plan")
    log = TORCHRUN.format(time="2026-01-26_15:30:02", rank=3, code=-9)
    recorded = Result("x", status=Status.FAILED, exit_code=4, failure=gone)
    noted = failure(attempt(tmp_path, log, recorded), Ending(1))
    assert (noted.rank, noted.phase) == (3, "plan")
    assert noted.message.startswith("killed on node1 by signal 9")


@pytest.mark.parametrize(
    "noticed",
    [
        "was told to stop (SIGTERM)",
        "died or was killed (it stopped answering)",
        "lost the rendezvous store: timed out",
        "RuntimeError: Connection closed by peer",
    ],
)
def test_what_other_ranks_noticed_gives_way_to_the_signal_that_the_launcher_saw_first(
    tmp_path: Path, noticed: str
) -> None:
    """A rank that the kernel ends while it starts has no heartbeat yet, by which the others could name it."""
    log = TORCHRUN.format(time="2026-01-26_15:30:02", rank=3, code=-9)
    recorded = Result("x", status=Status.FAILED, exit_code=4, failure=Failure(noticed, 2, "plan"))
    told = attempt(tmp_path, log, recorded)
    noted = failure(told, Ending(1))
    assert (noted.rank, noted.phase) == (3, None)
    assert noted.message.startswith("killed on node1 by signal 9 (SIGKILL): most likely the kernel, for lack of memory")
    assert failure(told, Ending(1)) == noted


def test_an_error_that_ranks_named_stays_beside_a_later_abort(tmp_path: Path) -> None:
    slow = Failure("took longer than the timeout of 300 s", 2, "plan")
    log = TORCHRUN.format(time="2026-01-26_15:30:02", rank=3, code=-6)
    recorded = Result("x", status=Status.FAILED, exit_code=4, failure=slow)
    assert failure(attempt(tmp_path, log, recorded), Ending(1)) == slow


def test_a_missing_transport_is_waived_also_behind_torchrun(tmp_path: Path) -> None:
    direct = close(attempt(tmp_path, "error: nvshmem4py is not installed: pip install it\n"), Ending(3))
    behind = close(attempt(tmp_path, TORCHRUN.format(time="2026-01-26_15:30:09", rank=0, code=3)), Ending(1))
    assert (direct.status, direct.exit_code) == (behind.status, behind.exit_code) == (Status.WAIVED, 3)
    assert direct.failure == Failure("nvshmem4py is not installed: pip install it")
    assert behind.failure is not None
    assert behind.failure.rank is None
    assert close(attempt(tmp_path, "x"), Ending(3, cancelled=True)).status is Status.FAILED


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
