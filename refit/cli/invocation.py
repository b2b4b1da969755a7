"""How this program was called: hints name whole commands, which work where they are pasted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from refit.config.scenario import num_nodes


def command_text(words: Sequence[str]) -> str:
    """`words` of the command `refit` as a line for the shell that this process was started from: `refit WORDS`, or
    `.venv/bin/python -m refit WORDS` where it was called as a module."""
    return shlex.join([*_program(), *words])


def ranks_command(num_ranks: int, ranks_per_node: int, words: Sequence[str]) -> str:
    """The command that starts a scenario with the flags `words`: `refit run`, or a job where one node is too small."""
    if num_ranks <= ranks_per_node:
        return command_text(["run", *words])
    nodes = num_nodes(num_ranks, ranks_per_node)
    return shlex.join(["sbatch", f"--nodes={nodes}", "benchmark_refit_sbatch.sh", *words])


def _program() -> list[str]:
    called = Path(sys.argv[0])
    if called.name == "refit":
        return [sys.argv[0]]
    python = Path(sys.executable)
    return [str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python), "-m", "refit"]
