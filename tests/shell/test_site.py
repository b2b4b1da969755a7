"""A site's values: where they come from and what they become."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.shell.conftest import ROOT, Shell

DRY_RUN = ("benchmark_refit_kimi_k2.sh", "--dry-run", "--scenarios", "tiny")


def test_the_environment_wins_over_the_site_file(shell: Shell) -> None:
    site = Path(shell.environ["REFIT_SITE_FILE"])
    site.write_text('REFIT_ACCOUNT="of the file"\nREFIT_PARTITION=of_the_file\n')
    code, output = shell.run(*DRY_RUN, REFIT_PARTITION="of_the_environment")
    assert code == 0, output
    assert r"--account=of\ the\ file --partition=of_the_environment" in output


@pytest.mark.parametrize(
    ("content", "environ", "message"),
    [
        ("REFIT_ACOUNT=x\n", {}, "unknown setting REFIT_ACOUNT"),
        ("REFIT_TASKS=core\n", {}, "REFIT_TASKS must be node or gpu, not core"),
        ("REFIT_MODULES=nvshmem\n", {}, "there is no module command here"),
        ("REFIT_PARTITION='gpus\n", {}, "is no valid bash"),
        ("", {"REFIT_SITE_FILE": "/nowhere/site.env"}, "REFIT_SITE_FILE names /nowhere/site.env, which is not there"),
        ("", {"REFIT_PYTHON": "/usr/bin/false"}, "cannot import numpy, rich and yaml"),
    ],
)
def test_a_wrong_setting_is_an_error_with_the_remedy(
    shell: Shell, content: str, environ: dict[str, str], message: str
) -> None:
    Path(shell.environ["REFIT_SITE_FILE"]).write_text(content)
    code, output = shell.run(*DRY_RUN, **environ)
    assert code == 2, output
    assert message in output.splitlines()[-1]


def test_every_setting_is_in_the_example_and_in_the_documents() -> None:
    (known,) = re.findall(r'KNOWN_SETTINGS="([^"]+)"', (ROOT / "scripts/common.sh").read_text())
    names = {f"REFIT_{name}" for name in known.replace("\\\n", "").split()} - {"REFIT_SLURM_TEST"}
    for path in ("docs/slurm.md", "site.env.example"):
        text = (ROOT / path).read_text()
        missing = {name for name in names if name not in text}
        assert missing <= ({"REFIT_ROOT", "REFIT_SITE_FILE"} if path == "site.env.example" else set()), path


def test_the_example_sets_nothing(shell: Shell) -> None:
    code, output = shell.run(*DRY_RUN, REFIT_SITE_FILE=str(ROOT / "site.env.example"))
    assert code == 0, output
    assert "--account" not in output


def test_every_option_in_the_documents_is_one(shell: Shell) -> None:
    _, help_text = shell.run(DRY_RUN[0], "--help")
    text = (ROOT / "docs/slurm.md").read_text()
    used = {
        option
        for line in re.findall(r"benchmark_refit_kimi_k2\.sh (.*)", text)
        for option in re.findall(r"--[a-z-]+", line)
    }
    assert used >= {"--dry-run", "--submit", "--array", "--resume"}
    assert {option for option in used if option not in help_text} == set()


END = "did not run to its end"


@pytest.mark.parametrize("ending", ["set -e; false", "exit 1", "exit 0", "exec true", "set -e\nNAME=$(false)"])
def test_a_site_file_that_ends_early_is_an_error(shell: Shell, ending: str) -> None:
    site = Path(shell.environ["REFIT_SITE_FILE"])
    site.write_text(f"REFIT_ACCOUNT=science\n{ending}\nREFIT_PARTITION=gpus\n")
    code, output = shell.run(*DRY_RUN)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith(f"error: site file {site} {END}: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending", ["false", "[[ -d /nowhere ]] && REFIT_PARTITION=other", "return", "set -e", "set -u"]
)
def test_a_site_file_may_end_in_a_command_that_fails(shell: Shell, ending: str) -> None:
    Path(shell.environ["REFIT_SITE_FILE"]).write_text(f"REFIT_ACCOUNT=science\n{ending}\n")
    code, output = shell.run(*DRY_RUN)
    assert code == 0, output
    assert "--account=science" in output
