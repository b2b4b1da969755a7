"""`refit sweep run` with a launcher of a few lines: scenarios in turn, what they leave, and what a signal leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from refit.commands import main
from refit.config.registry import LAUNCHERS
from refit.config.rows import LauncherKind
from refit.launch.base import Job, Launcher
from refit.results.upgrade import SWEEP_VERSION

STUB = Path(__file__).resolve().parents[1] / "shell/bin/stub_node"
SMALL = {"model": "tiny", "num-layers": 1, "moe-layer-freq": 1, "vocab-size": 512, "num-benchmark-iterations": 2}


class StubLauncher(Launcher):
    """Starts what writes a result in place of ranks; a scenario `signals` tells this process to stop."""

    def command(self, job: Job) -> Sequence[str]:
        if "signals" in job.stem.name:
            return ["sh", "-c", f"kill -TERM {os.getpid()}; sleep 300"]
        return [sys.executable, str(STUB), "node", "python", "1", "1", str(job.rank_logs), *job.flags]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("STANDIN_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    with LAUNCHERS.added("stub", LauncherKind(f"{__name__}:StubLauncher", "nothing")):
        yield tmp_path


def sweep(folder: Path, *names: str) -> list[str]:
    lines = [f"2:1:1:2:collocated:gloo:{name}" for name in names]
    (folder / "list.yaml").write_text(json.dumps({"title": "Own", "defaults": SMALL, "scenarios": lines}))
    chosen = ["--scenarios", str(folder / "list.yaml"), "--num-gpus", "8", "--launcher", "stub"]
    return ["sweep", "run", *chosen, "--output-dir", str(folder / "out")]


def run_id(folder: Path) -> str:
    (path,) = (folder / "out/logs").glob("*_sweep.json")
    return path.name.removesuffix("_sweep.json")


def test_scenarios_run_in_turn_and_are_summed_up(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(sweep(folder, "good", "crash", "wrong")) == 1  # wrong data outweighs a failure
    output = capfd.readouterr().out
    assert re.findall(r"^\[(\d/3)\] (\w+): 1 x 8 ranks, log: ", output, re.MULTILINE) == [
        ("1/3", "good"),
        ("2/3", "crash"),
        ("3/3", "wrong"),
    ]
    assert "crash: " in output
    assert "ended with exit code 1: boom" in output
    logs, run = folder / "out/logs", run_id(folder)
    assert (logs / f"{run}_crash_ranks/node0/rank0.err").read_text() == "boom\n"
    assert (logs / f"{run}_summary.txt").read_text().strip() in output
    assert not list(logs.glob("*.lock"))


def test_a_signal_ends_the_run_in_order_and_it_is_gone_on_with(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(sweep(folder, "good", "signals", "last")) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    output, aside = capfd.readouterr()
    run = run_id(folder)
    assert "Cancelled during signals" in aside
    assert "it was not started" in output
    hint = re.search(r"^Go on with: (.* --resume .*)$", aside, re.MULTILINE)
    assert hint is not None, aside
    words = shlex.split(hint[1])
    assert [os.path.abspath(words[0]), *words[1:3]] == [sys.executable, "-m", "refit"]
    assert words[words.index("--resume") + 1] == run
    assert main(words[3:]) == 143, "it is a whole command"
    output, aside = capfd.readouterr()
    assert re.findall(r"^\[1/2\] (\w+):", output, re.MULTILINE) == ["signals"], "good has a result"
    table = aside.partition("Cancelled")[0]
    assert re.search(r"^good .* ok\b", table, re.MULTILINE), table
    assert re.search(r"^last .* ready\b", table, re.MULTILINE), table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "failed"], "--only goes with --resume RUN_ID"),
        (["--launcher", "pigeon"], "unknown launcher 'pigeon': choose one of kubernetes, local, slurm, stub"),
    ],
)
def test_what_cannot_be_honoured(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*sweep(folder, "good"), *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not (folder / "out").exists()


def test_a_run_that_an_older_build_began_is_gone_on_with(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its sweep file and its results are of older schema versions; what it has measured is not measured again."""
    logs = folder / "out/logs"
    shutil.copytree(Path(__file__).resolve().parents[1] / "results/golden/older_run", logs)
    before = (logs / "old_done.json").read_text()
    words = ["sweep", "run", "--resume", "old", "--launcher", "stub", "--output-dir", str(folder / "out")]
    assert main(words) == 0
    output = capfd.readouterr().out
    assert re.findall(r"^\[(\d/\d)\] (\w+): ", output, re.MULTILINE) == [("1/1", "left")]
    assert re.findall(r"^Config: (\w+)$", output, re.MULTILINE) == ["done", "chosen", "left"]
    assert "3 scenarios: 3 ok" in output
    assert (logs / "old_done.json").read_text() == before
    assert json.loads((logs / "old_sweep.json").read_text())["schema_version"] == SWEEP_VERSION
    assert main(words) == 0
    assert not re.search(r"^\[1/", capfd.readouterr().out, re.MULTILINE), "nothing is left"
