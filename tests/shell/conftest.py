"""An allocation that is none: Slurm's programs are stood in for by those of tests/shell/bin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(__file__).resolve().parent / "bin"


@dataclass
class Shell:
    """Runs the scripts from `cwd`, whose path has a space in it, and remembers nothing between runs but files."""

    cwd: Path
    environ: dict[str, str] = field(default_factory=dict)

    def start(self, script: str | Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        path = script if isinstance(script, Path) else ROOT / script
        return subprocess.Popen(
            [str(path), *arguments],
            cwd=self.cwd,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str | Path, *arguments: str, **environ: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(script, *arguments, **environ)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of every call of a stand-in so far."""
        path = self.cwd / f"{program}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def logs(self) -> Path:
        return self.cwd / "benchmark_results" / "kimi_k2" / "logs"

    def only(self, pattern: str) -> Path:
        (path,) = self.logs.glob(pattern)
        return path


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A machine without a Slurm job, and without what this machine's environment may say of one."""
    cwd = tmp_path / "a folder"
    cwd.mkdir()
    site = cwd / "site.env"
    site.write_text("")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "REFIT_", "CUDA_"))}
    environ = {
        **kept,
        # This Python also starts the stand-ins: the one found first may be slow to start, as pyenv's is.
        "PATH": f"{BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STANDIN_FOLDER": str(cwd),
        "REFIT_PYTHON": sys.executable,
        "REFIT_SITE_FILE": str(site),
    }
    return Shell(cwd, environ)


@pytest.fixture
def job(shell: Shell) -> Shell:
    """The same inside an allocation of two nodes with two GPUs each, where scripts/node.sh is a stub."""
    shell.environ |= {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost,127.0.0.1",
        "SLURM_GPUS_ON_NODE": "2",
        "STANDIN_NODE": str(BIN / "stub_node"),
    }
    return shell
