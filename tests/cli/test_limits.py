"""Sizes beyond their limits, folders that take no results and closed pipes: one line, and the exit code documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
TINY = "--model tiny --dry-run"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--hidden-size 4294967296", "--hidden-size: must be at most 16,777,216, got 4,294,967,296"),
        ("--num-layers 100000", "--num-layers: must be at most 1,000, got 100,000"),
        ("--num-experts 100000", "--num-experts: must be at most 4,096, got 100,000"),
        ("--source-world-size 10000000", "--source-world-size: must be at most 4,096, got 10,000,000"),
        (
            "--tensor-model-parallel-size 64 --expert-model-parallel-size 128",
            "source: 8,192 ranks are more than the 4,096 that can be planned",
        ),
        ("--source-world-size 4096", "destination: 4,096 + 1 ranks are more than the 4,096 that can be planned"),
        ("--hidden-size 16777216 --ffn-hidden-size 16777216", "1e+14 are the most"),
        ("--timeout 1e300", "--timeout: must be at most 10,000,000 seconds, got 1e300"),
        (f"--run-name {'a' * 251}", "--run-name: has 251 characters, 200 are the most"),
        (f"--num-layers {'9' * 5000}", "--num-layers: expected a whole number, got '999"),
        (f"--num-layers {'9' * 100}", "--num-layers: must be at most 1,000, got a number of 100 digits"),
        ("--moe-layer-freq [0]*900+[1]*900", "expected a number or a list of 0 and 1"),
    ],
)
def test_a_size_beyond_its_limit(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{TINY} {line}".split()) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_dry_run_of_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--dry-run --model kimi_k2 --cluster h100_ib400 --tensor-model-parallel-size 4"
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert "Memory per source GPU" in shown.out
    assert shown.err.startswith("error: the source needs ")
    assert "h100_ib400 has 80.00 GB: " in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 256])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_folder_that_takes_no_results(
    place: str, rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "refit.bench.runner", None)
    code = main(["--model=tiny", "--refit-method=gloo", f"--output-dir={tmp_path / place}"])
    shown = capsys.readouterr().err
    assert code == (2 if rank == "0" else 0)
    assert shown.startswith("error: results cannot be written to --output-dir ") == (rank == "0")
    assert shown.count("\n") == (1 if rank == "0" else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_closed_pipe_ends_a_dry_run_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, str(ROOT / "benchmark_refit.py"), *TINY.split()]
    try:
        done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=150, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
