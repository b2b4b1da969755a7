"""`refit run`: the ranks of this machine, torchrun's own words left out, its exit code replaced by the run's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.cli.parsing import parse
from refit.commands import main
from refit.commands.run import show_killed, without_launcher
from refit.config.registry import AUTO, METHODS
from refit.predict import cpus
from refit.report.refits.headline import headlines
from refit.results.refit import RefitResult
from refit.results.result import Failure, Result, encoded, read_result
from refit.results.runs import find_run
from refit.results.status import Status
from refit.sweep.close import Cause
from tests.ranks.waiting import pid_of_rank, read_until, wait_until
from tests.report import factories

SMALL = [
    "--model",
    "tiny",
    "--num-layers",
    "1",
    "--moe-layer-freq",
    "1",
    "--vocab-size",
    "512",
    "--refit-method",
    "gloo",
]

STARTS = pytest.mark.parametrize("start", ["fork", "spawn"])

AGENTS_LOG = """\
W1121 13:00:07.440000 22955 torch/distributed/run.py:874] Setting OMP_NUM_THREADS environment variable
E1121 13:00:09.100000 22955 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 2) local_rank: 0
"""
AGENTS_REPORT = """\
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
  exitcode  : 2 (pid: 42)
============================================================
"""
RANKS_TRACEBACK = """\
Traceback (most recent call last):
  File "model.py", line 1, in build
ValueError: no such model
"""


def test_torchruns_words_are_left_out() -> None:
    lines = [*AGENTS_LOG.splitlines(), "error: no", *AGENTS_REPORT.splitlines()]
    assert list(without_launcher(iter(lines))) == ["error: no"]


def test_a_traceback_of_a_rank_is_shown() -> None:
    lines = [*RANKS_TRACEBACK.splitlines(), "error: later", *AGENTS_REPORT.splitlines()]
    assert list(without_launcher(iter(lines))) == [*RANKS_TRACEBACK.splitlines(), "error: later"]
    cut_off = RANKS_TRACEBACK.splitlines()[:2]
    assert list(without_launcher(iter(cut_off))) == cut_off


GONE = "FAILED: rank 1 failed in phase 'plan': died or was killed (it stopped answering)"


@pytest.mark.parametrize(
    ("verdict", "cause", "told"),
    [
        (GONE, Cause(-9, 1, "node7"), "FAILED: rank 1 failed in phase 'plan': killed on node7 by signal 9 (SIGKILL): "),
        ("", Cause(-9, 1, "node7"), "FAILED: rank 1 failed: killed on node7 by signal 9 (SIGKILL): most likely"),
        (GONE, Cause(-11, 0), "FAILED: rank 0 failed: killed by signal 11 (SIGSEGV): "),
        (GONE, Cause(4, 1), GONE),
        ("", Cause(4, 1), ""),
    ],
)
def test_a_killed_rank_is_told_of_once(
    capsys: pytest.CaptureFixture[str], verdict: str, cause: Cause, told: str
) -> None:
    show_killed(verdict, cause)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told)
    assert "".join(lines).startswith(told)


def test_usage_errors_come_before_any_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SMALL, "--tensor-model-parallel-size", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: source: ")


def test_more_than_this_machine_can_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "kimi_k2", "--refit-method", "gloo", "--tensor-model-parallel-size", "64"]) == 2
    assert "--dry-run" in capsys.readouterr().err


QWEN3 = "--model qwen3_30b_a3b --tensor-model-parallel-size 4 --expert-model-parallel-size 8 --rl-inference-format vllm"
QWEN3 += " --rl-inference-tensor-model-parallel-size 8 --rl-inference-replicas 2 --cluster h100_ib400"


@pytest.mark.parametrize("method", [*(name for name, row in METHODS.items() if row.device == "cpu"), AUTO])
def test_no_method_starts_ranks_that_need_more_memory_than_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """48 ranks of a model of 30 billion parameters, on a machine that has few cores and little memory."""
    monkeypatch.setattr(cpus, "has_gpu", lambda: False)
    monkeypatch.setattr(cpus, "this_machine", lambda: cpus.Machine(2, 16 * 10**9))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("ranks were started"))
    assert main(["run", *QWEN3.split(), "--refit-method", method]) == 2
    assert re.search(r"error: ranks on the CPUs .* GB of memory > 16\.00 GB free", capsys.readouterr().err)


class Started(Exception):
    """Ranks would have been started."""


def test_the_memory_that_ranks_need_follows_from_their_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(command: list[str], **_: object) -> None:
        assert command[2] == "refit.cli.forked"
        raise Started

    monkeypatch.setattr(cpus, "this_machine", lambda: cpus.Machine(2, 8 * 10**9))
    monkeypatch.setattr(subprocess, "Popen", launched)
    flags = ["--model", "tiny", "--refit-method", "gloo", "--source-world-size", "24", "--destination-world-size", "24"]
    with pytest.raises(Started):
        main(["run", *flags])
    assert main(["run", "--start", "spawn", *flags]) == 2
    assert "GB of memory > 8.00 GB free" in capsys.readouterr().err


def test_ctrl_c_keeps_and_shows_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three of five refits were measured. The ranks say that they were told to stop, which is not the cause."""

    def launched(command: list[str], **kwargs: Any) -> subprocess.Popen[str]:
        name = next(word for word in command if word.startswith("--run-name=")).partition("=")[2]
        scenario = parse([*SMALL, "--num-benchmark-iterations", "5"]).scenario
        engine = factories.engine([[0.2], [0.4], [0.3]])
        partly = replace(engine, status=Status.RUNNING, summary=None)
        failure = Failure("was told to stop (SIGTERM)", 0, "refit iteration 6: move")
        measured = {"refit": RefitResult(engines={"refit": partly})}
        ended = Result(name, status=Status.FAILED, failure=failure, scenario=scenario, measurements=measured)
        ended = replace(ended, exit_code=4)
        (tmp_path / f"{name}.json").write_text(encoded(ended))
        text = (
            f"import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({(TOLD + chr(10))!r})); "
            "time.sleep(0.3); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
        )
        return started_process([sys.executable, "-c", text], **kwargs)

    started_process = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", launched)
    assert main(["run", *SMALL, "--output-dir", str(tmp_path)]) == 143
    told = "FAILED: cancelled after 3 of 5 refits; 300 ms median (200-400, 3 refits)"
    errors = capsys.readouterr().err
    assert told in errors
    assert "told to stop" not in errors
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert "Mean refit time" not in shown, "scripts take that line for a result"
    assert main(["report", str(tmp_path), "--format", "markdown"]) == 0
    assert "300.00 (interrupted)" in capsys.readouterr().out


TOLD = "FAILED: rank 0 failed in phase 'build': was told to stop (SIGTERM)"
KILLED = """\
Root Cause (first observed failure):
[0]:
  time      : 2026-01-26_15:30:02
  host      : node7
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
"""


def test_the_cause_is_one_in_terminal_result_and_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel ends rank 1 before its first heartbeat. The other ranks only know that they were told to stop."""

    def launched(command: list[str], **kwargs: Any) -> subprocess.Popen[str]:
        """What stands in for the launcher: rank 0 writes its result, and the launcher its report of rank 1."""
        name = next(word for word in command if word.startswith("--run-name=")).partition("=")[2]
        failure = Failure("was told to stop (SIGTERM)", 0, "build")
        ended = Result(name, status=Status.FAILED, exit_code=4, failure=failure)
        (tmp_path / f"{name}.json").write_text(encoded(ended))
        text = f"import sys; sys.stderr.write({(TOLD + chr(10) + KILLED)!r}); sys.exit(1)"
        return started_process([sys.executable, "-c", text], **kwargs)

    started_process = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", launched)
    assert main(["run", *SMALL, "--output-dir", str(tmp_path)]) == 4
    errors = capsys.readouterr().err
    cause = "killed on node7 by signal 9 (SIGKILL): most likely the kernel, for lack of memory"
    assert f"FAILED: rank 1 failed: {cause}" in errors
    assert "told to stop" not in errors
    (path,) = tmp_path.glob("*.json")
    failure = read_result(path).failure
    assert failure is not None
    assert (failure.rank, failure.phase) == (1, None)
    assert failure.message.startswith(cause)
    assert main(["report", str(tmp_path)]) == 0
    assert f"FAILED: rank 1: {cause}" in capsys.readouterr().out


def test_fewer_ranks_than_the_scenario_needs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--nproc-per-node", "1", *SMALL]) == 2
    assert "1 + 1 = 2 GPUs needed > 1 available" in capsys.readouterr().err


def test_a_dry_run_starts_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SMALL, "--dry-run"]) == 0
    assert "World size: 2 (using 2 GPUs)" in capsys.readouterr().out


def started(start: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "refit", "run", "--start", start, *SMALL, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@STARTS
def test_a_verified_refit(tmp_path: Path, start: str) -> None:
    process = started(start, "--output-dir", str(tmp_path))
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert "0 wrong" in output
    assert errors == ""
    (path,) = tmp_path.glob("*.json")
    result = read_result(path)
    assert result.environment is not None
    assert result.environment.variables.get("REFIT_START", "spawn") == start
    assert result.environment.command.startswith("__main__.py --model tiny")


@pytest.mark.slow
@STARTS
def test_a_killed_rank_is_named_with_its_signal_and_the_remedy(tmp_path: Path, start: str) -> None:
    flags = ["--num-benchmark-iterations", "100000", "--output-dir", str(tmp_path)]
    process = started(start, "--nproc-per-node", "3", *flags)
    assert process.stdout is not None
    output = read_until(process.stdout.readline, "/100000:")
    assert "Idle ranks: 2 (not participating)" in output
    os.kill(pid_of_rank(1, tmp_path), signal.SIGKILL)
    rest, errors = process.communicate(timeout=150)
    assert process.returncode == 4, (rest, errors)
    (line,) = [line for line in (output + rest + errors).splitlines() if line.startswith(("FAILED", "error"))]
    assert re.fullmatch(
        r"FAILED: rank 1 failed( in phase '.+')?: killed on \S+ by signal 9 \(SIGKILL\): .*dmesg.*", line
    )
    assert "====" not in errors
    assert "ChildFailedError" not in errors
    (path,) = tmp_path.glob("*.json")
    failure = read_result(path).failure
    assert failure is not None
    assert failure.message.startswith("killed on ")
    assert line.endswith(failure.message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "start"), [(signal.SIGTERM, "fork"), (signal.SIGINT, "fork"), (signal.SIGTERM, "spawn")]
)
def test_a_signal_ends_the_ranks(tmp_path: Path, number: signal.Signals, start: str) -> None:
    process = started(start, "--num-benchmark-iterations", "100000", "--output-dir", str(tmp_path))
    assert process.stdout is not None
    read_until(process.stdout.readline, "/100000:")
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 143, (output, errors)
    assert "Traceback" not in errors
    assert ranks_left(tmp_path) == []
    assert_is_shown_as_cancelled(errors, tmp_path)


def assert_is_shown_as_cancelled(errors: str, directory: Path) -> None:
    """One line, with what was measured until then, which the result and the report have too."""
    (line,) = [line for line in errors.splitlines() if line.startswith("TP1 EP1 -> TP1 EP1 over gloo: ")]
    done = re.search(r"FAILED: cancelled after (\d+) of 100,000 refits; .* median .*, \1 refits\)|, 1 refit", line)
    assert done is not None, line
    assert "told to stop" not in errors
    (outcome,) = find_run(directory).outcomes
    assert headlines(outcome) == [line]
    assert outcome.tested is not None
    assert outcome.tested.doubt == "interrupted"


@pytest.mark.slow
@STARTS
@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(2)")
def test_a_kill_ends_the_ranks_too(tmp_path: Path, start: str) -> None:
    """Nobody reads any more what they print, and the result says how they ended all the same."""
    process = started(
        start, "--num-benchmark-iterations", "100000", "--output-dir", str(tmp_path), "--run-name", "killed"
    )
    assert process.stdout is not None
    read_until(process.stdout.readline, "/100000:")
    assert ranks_left(tmp_path)
    process.kill()
    process.communicate(timeout=150)  # ends when the last rank has closed its end of the pipe
    wait_until(lambda: not ranks_left(tmp_path))
    result = read_result(tmp_path / "killed.json")
    assert (result.status, result.exit_code) == (Status.FAILED, 4)
    assert result.refit is not None
    assert result.refit.engines["refit"].samples


def ranks_left(directory: Path) -> list[str]:
    """Processes that have this test's output directory on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(directory).encode() in words:
                found.append(entry.name)
    return found
