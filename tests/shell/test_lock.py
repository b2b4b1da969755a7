"""Locks of runs: no two processes run the scenarios of one run, and what a killed one has left is no obstacle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.waiting import wait_until
from tests.shell.conftest import ROOT, Shell
from tests.shell.test_suite import KIMI, line, scenarios

ELSEWHERE = "exclusive elsewhere 4711 {job} 2026-01-02 03:04:05\n"


def begun(job: Shell) -> tuple[subprocess.Popen[str], str]:
    """A suite in a scenario that hangs, and its run id."""
    process = job.start(KIMI, *scenarios(job.cwd, line("good"), line("hang"), line("last")))
    wait_until(lambda: any("stub" in path.read_text() for path in job.logs.glob("*_hang.log")))
    return process, job.only("*_sweep.json").name.removesuffix("_sweep.json")


def finished(job: Shell) -> str:
    """The id of a run without its only scenario's result."""
    code, output = job.run(KIMI, *scenarios(job.cwd, line("good")))
    assert code == 0, output
    job.only("*_good.json").unlink()
    return job.only("*_sweep.json").name.removesuffix("_sweep.json")


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_one_process(job: Shell) -> None:
    process, run_id = begun(job)
    before = sorted(job.logs.iterdir())
    code, output = job.run(KIMI, "--resume", run_id)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith(f"error: run {run_id} is being run by PID {process.pid} on {socket.gethostname()}, job 77")
    assert output.endswith(": wait until it has ended, or end it\n")
    assert sorted(job.logs.iterdir()) == before
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert not list(job.logs.glob("*.lock"))


@pytest.mark.slow
def test_a_killed_script_holds_its_lock_while_its_ranks_run(job: Shell) -> None:
    process, run_id = begun(job)
    process.kill()
    process.wait()
    code, output = job.run(KIMI, "--resume", run_id)
    assert (code, "that PID has ended, but what it started still runs: end it (fuser " in output) == (2, True), output
    (job.cwd / "repaired").touch()
    end_all(job.cwd)
    code, output = job.run(KIMI, "--resume", run_id)
    assert code == 0, output
    assert f"The lock of run {run_id} was left by PID {process.pid} on " in output
    assert not list(job.logs.glob("*.lock"))


def end_all(folder: Path) -> None:
    """End the processes that have this test's folder in their environment, as the killed script's steps have."""
    for pid in started_from(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not started_from(folder))


def started_from(folder: Path) -> list[int]:
    name, found = f"STANDIN_FOLDER={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and name in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "code"), [("5", 2), ("", 0)], ids=["still there", "over"])
def test_a_lock_of_another_node_stands_until_slurm_says_its_job_is_over(job: Shell, jobs: str, code: int) -> None:
    run_id = finished(job)
    lock = job.logs / f"{run_id}_sweep.lock"
    lock.write_text(ELSEWHERE.format(job=5))
    found, output = job.run(KIMI, "--resume", run_id, STANDIN_JOBS=jobs)
    assert found == code, output
    if code:
        assert f"run {run_id} may still be run by PID 4711 on elsewhere, job 5, since 2026-01-02 03:04:05, " in output
        assert output.endswith(f"if that has ended, remove {str(lock).replace(' ', chr(92) + ' ')}\n")
    assert lock.exists() == bool(code)


def test_a_lock_file_is_never_executed(job: Shell) -> None:
    run_id = finished(job)
    hostile = f"exclusive $(touch${{IFS}}{job.cwd}/x) a[$(touch${{IFS}}x)] b[$(touch${{IFS}}x)] \x1b[2J\n"
    (job.logs / f"{run_id}_sweep.lock").write_text(hostile)
    code, output = job.run(KIMI, "--resume", run_id)
    assert code == 2
    assert "\x1b" not in output
    assert not (job.cwd / "x").exists()


@pytest.mark.slow
def test_jobs_of_an_array_share_a_run_but_no_scenario(job: Shell) -> None:
    run_id = finished(job)
    sweep = str(job.only("*_sweep.json"))
    command = (
        "import sys; from pathlib import Path; from refit.launch.host import Stop, ThisProcess; "
        "from refit.sweep.lock import hold\n"
        "with hold('run', 'shared', Path(sys.argv[1]), ThisProcess(Stop())): print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", command, f"{sweep[:-5]}.lock"],
        env={**job.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    code, output = job.run(KIMI, "--resume", run_id)
    assert (code, f"is being run by PID {holder.pid} on " in output) == (2, True), output
    code, output = job.run(KIMI, "--array-task", sweep, "--", "good", SLURM_ARRAY_TASK_ID="0")
    assert (code, "2.00 ms median (1 refit)" in output) == (0, True), output
    assert (job.logs / f"{run_id}_sweep.lock").exists(), "another job holds it"
    assert not (job.logs / f"{run_id}_good.lock").exists()
    holder.communicate("\n", timeout=100)
    assert not list(job.logs.glob("*.lock"))
