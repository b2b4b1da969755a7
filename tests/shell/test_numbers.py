"""Values from the environment and the command line: a decimal number in bounds, or an error. None is executed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import ROOT, Shell

KIMI, SINGLE, SMOKE = "benchmark_refit_kimi_k2.sh", "benchmark_refit_sbatch.sh", "test_nvshmem_refit.sh"
DRY_RUN = ("--dry-run", "--scenarios", "tiny")
FLAGS = ("--model", "tiny", "--refit-method", "gloo")
HOSTILE = "PATH[$(touch executed)]"
FROM_OUTSIDE = [
    "REFIT_GPUS_PER_NODE",
    "REFIT_SCENARIO_TIMEOUT",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_ARRAY_TASK_ID",
]


def refused(shell: Shell, name: str, script: str, *arguments: str, **environ: str) -> str:
    """The one line of a call that is refused for the number `name`."""
    code, output = shell.run(script, *arguments, **environ)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith(f"error: {name}"), output
    assert "must be a whole number from " in output
    assert {path.name for path in shell.cwd.iterdir()} == {"site.env"}, "nothing is executed, and nothing written"
    return output


@pytest.mark.parametrize("name", FROM_OUTSIDE)
@pytest.mark.parametrize("script", [KIMI, SINGLE, SMOKE])
def test_the_environment_is_never_executed(shell: Shell, script: str, name: str) -> None:
    arguments = DRY_RUN if script == KIMI else FLAGS
    refused(shell, name, script, *arguments, **{"SLURM_JOB_ID": "7", name: HOSTILE})


@pytest.mark.parametrize("name", ["SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"])
def test_what_slurm_says_of_gpus_is_never_executed(shell: Shell, name: str) -> None:
    refused(shell, "the number in SLURM_GPUS_ON_NODE", SINGLE, *FLAGS, **{"SLURM_JOB_ID": "7", name: f"h100:{HOSTILE}"})


@pytest.mark.parametrize("option", ["--nodes", "--throttle", "--timeout"])
@pytest.mark.parametrize(
    "value", [HOSTILE, "0", "99999999999999999999", "18446744073709551617", "1e3", "-1", "1 ", "0x8"]
)
def test_options_are_numbers_in_bounds(shell: Shell, option: str, value: str) -> None:
    refused(shell, f"{option} must be", KIMI, *DRY_RUN, "--array", option, value)


def test_a_name_in_the_environment_is_never_executed(shell: Shell) -> None:
    code, output = shell.run(KIMI, *DRY_RUN, **{HOSTILE: "1"})
    assert code == 0, output
    assert not (shell.cwd / "executed").exists()


@pytest.mark.parametrize("value", ["08", "8", "000000000000000000000008"])
def test_leading_zeros_mean_nothing(shell: Shell, value: str) -> None:
    code, output = shell.run(KIMI, *DRY_RUN, "--nodes", value, REFIT_GPUS_PER_NODE=value)
    assert code == 0, output
    assert "64 GPUs (8 nodes of 8)" in output
    assert " --nodes=8 " in output


@pytest.mark.parametrize(
    ("value", "shown"),
    [("0", "0"), ("0000", "0"), ("0100", "100"), ("101", ""), ("", ""), ("9" * 18, ""), ("9" * 19, ""), ("1\n2", "")],
)
def test_whole_number(value: str, shown: str) -> None:
    script = 'root=$1; source "$1/scripts/common.sh"; whole_number NAME "$2" 0 100'
    done = subprocess.run(
        ["bash", "-euc", script, "bash", str(ROOT), value], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == ((0, shown) if shown else (2, ""))
    assert len(done.stderr.splitlines()) == (0 if shown else 1)


def test_no_script_evaluates_text() -> None:
    for path in [*ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.sh")]:
        assert not re.search(r"^[^#]*\beval\b", Path(path).read_text(), re.MULTILINE), path
