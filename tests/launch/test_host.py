"""Commands end as they end, after their time, or because of a signal; what they had started ends with them."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from refit.launch.base import Job
from refit.launch.host import NOT_FOUND, REQUEST, TIMED_OUT, Cancelled, Script, Stop, ThisProcess
from refit.launch.rank_logs import keep_rank_logs
from tests.ranks.waiting import wait_until

ENDLESS = ["sh", "-c", "echo begun; sleep 300 & echo $! >child; wait"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_running(folder: Path) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{(folder / 'child').read_text().strip()}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_command_leaves_its_output_and_its_exit_code(folder: Path) -> None:
    log, host = folder / "log", ThisProcess(Stop())
    log.write_text("before\n")
    assert host.run(["sh", "-c", "echo out; echo err >&2; exit 5"], log, 0) == 5
    assert log.read_text() == "before\nout\nerr\n"
    assert host.run(["sh", "-c", "kill -KILL $$"], log, 0) == 128 + signal.SIGKILL
    assert host.run(["no-such-program"], log, 0) == NOT_FOUND
    assert "no-such-program: No such file" in log.read_text()
    assert host.output(["sh", "-c", "echo said; exit 3"]) == (3, "said\n")
    assert host.output(["no-such-program"]) == (NOT_FOUND, "")


def test_after_its_time_a_command_ends_with_all_that_it_has_started(folder: Path) -> None:
    assert ThisProcess(Stop()).run(ENDLESS, folder / "log", 1) == TIMED_OUT
    wait_until(lambda: not is_running(folder))


def in_a_while(condition: Callable[[], bool], then: Callable[[], None]) -> None:
    def wait() -> None:
        wait_until(condition)
        then()

    threading.Thread(target=wait).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_says_so(folder: Path, number: signal.Signals) -> None:
    stop, before = Stop(), signal.getsignal(number)
    in_a_while(lambda: (folder / "child").exists(), lambda: os.kill(os.getpid(), number))
    with stop.on_signals(), pytest.raises(Cancelled):
        ThisProcess(stop).run(ENDLESS, folder / "log", 0)
    wait_until(lambda: not is_running(folder))
    assert signal.getsignal(number) is before


def test_the_script_is_asked_where_commands_cannot_be_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("7\n"))
    host = Script(folder)
    assert host.run(["srun", "a b", "c"], folder / "log", 60) == 7
    assert capsys.readouterr().out == f"{REQUEST}60\t{folder / 'log'}\tsrun\ta b\tc\n"
    with pytest.raises(Cancelled):  # the script has ended this process's input
        host.run(["srun"], folder / "log", 0)
    monkeypatch.setattr("sys.stdin", io.StringIO("0\n"))
    assert host.output(["squeue"]) == (0, "")
    assert not list(folder.glob(".said_*"))


@pytest.mark.parametrize("code", [0, 1])
def test_logs_of_ranks_are_kept_where_they_explain_a_failure(folder: Path, code: int) -> None:
    job = Job(2, 4, folder / "run_a", ())
    for node, rank, text in ((0, 1, "boom\n"), (1, 2, "also\n"), (1, 3, "")):
        path = job.rank_logs / f"node{node}" / "none_x" / "attempt_0" / str(rank) / "stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    keep_rank_logs(job, code)
    found = {path.relative_to(job.rank_logs).as_posix(): path.read_text() for path in job.rank_logs.rglob("*.*")}
    assert found == ({} if code == 0 else {"node0/rank1.err": "boom\n", "node1/rank6.err": "also\n"})
    assert job.rank_logs.exists() == bool(code)
