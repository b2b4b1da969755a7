"""Completion, as bash runs it."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from refit import commands
from refit.cli.completion import completion_script, subcommands
from refit.cli.flags import full_parser
from refit.config import yaml_files


def completed(line: str, shell: str = "bash") -> list[str]:
    """What the script offers for the last word of `line`, which is empty after a blank."""
    script = completion_script("bash", commands.command_parser(), full_parser())
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    function = "_refit_benchmark" if words[0] == "benchmark_refit.py" else "_refit"
    run = f"{script}\nCOMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}\n{function}\n"
    run += 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run([shell, "--norc", "-uc", run], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("refit re", ["report"]),
        ("refit ru", ["run"]),
        ("refit sweep p", ["plan"]),
        ("refit report --form", ["--format"]),
        ("refit report --format c", ["csv"]),
        ("refit run --refit-method n", ["nvshmem", "nccl", "nixl"]),
        ("refit run --model tiny --refit-mode ", ["collocated", "non-collocated"]),
        ("refit run --model k", ["kimi_k2"]),
        ("refit sweep plan --scenarios ki", ["kimi_k2"]),
        ("refit bounds --cluster gb", ["gb200_nvl72"]),
        ("refit bounds ki", ["kimi_k2"]),
        ("benchmark_refit.py --num-benchmark-w", ["--num-benchmark-warmup"]),
        ("refit report benchmark_re", []),
    ],
)
def test_offered(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


def test_every_command_and_preset_is_offered() -> None:
    assert set(subcommands(commands.command_parser())) <= set(completed("refit "))
    assert not {"place", "outcome"} & set(completed("refit "))
    assert completed("refit run --model ") == yaml_files.names("models")


def test_zsh_loads_bash_completion_first() -> None:
    script = completion_script("zsh", commands.command_parser(), full_parser())
    assert script.index("bashcompinit") < script.index("complete -o default")
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-fn"], input=script, text=True, check=True)
