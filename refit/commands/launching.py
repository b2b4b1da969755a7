"""Which launcher a sweep has, and what it is told: the flags, and what follows from them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refit.cli.invocation import command_text
from refit.config.registry import LAUNCHERS, load
from refit.errors import UsageError
from refit.launch.base import Launcher
from refit.launch.kubernetes.kinds import DEFAULT_KIND, KINDS
from refit.launch.kubernetes.launcher import KIND, VALUES
from refit.results.sweep import Planned, Sweep
from refit.sweep.run import task


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a launcher and say what it needs to know."""
    parser.add_argument(
        "--launcher",
        metavar="NAME",
        help=f"what starts ranks: {', '.join(LAUNCHERS)}; default: slurm in an allocation, else local",
    )
    parser.add_argument(
        "--values", type=Path, metavar="FILE", help=f"kubernetes: the site's settings, a YAML file; default: {VALUES}"
    )
    parser.add_argument(
        "--kind", metavar="NAME", help=f"kubernetes: {', '.join(KINDS)}; default: {KIND}, else {DEFAULT_KIND}"
    )


def launcher_class(args: argparse.Namespace) -> Any:
    """The launcher that was asked for, or the one for where this process runs. Raises UsageError."""
    name = args.launcher or ("slurm" if os.environ.get("SLURM_JOB_ID") else "local")
    found = load(LAUNCHERS[name].launcher)
    for flag in ("values", "kind"):
        if getattr(args, flag) is not None and not found.brings_nodes:
            raise UsageError(f"--{flag} goes with --launcher kubernetes, not with {name}")
    return found


def environment(args: argparse.Namespace) -> dict[str, str]:
    """This process's variables, with what flags say in place of them."""
    given = {VALUES: args.values, KIND: args.kind}
    return {**os.environ, **{name: str(value) for name, value in given.items() if value is not None}}


def launcher_words(args: argparse.Namespace) -> list[str]:
    """These flags as they were given, for the command that goes on."""
    given = {"--launcher": args.launcher, "--values": args.values, "--kind": args.kind}
    return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def fit(args: argparse.Namespace, launcher: Launcher) -> None:
    """Plan for the nodes that the launcher brings. Raises UsageError where flags contradict it."""
    if not launcher.brings_nodes:
        return
    if args.cpu_fallback:
        raise UsageError("--cpu-fallback plans for the CPUs of this machine, not for pods: leave it out")
    own = launcher.gpus_per_node
    if args.gpus_per_node not in (None, own):
        raise UsageError(f"--gpus-per-node is {args.gpus_per_node}, the values say {own}: leave the flag out")
    args.gpus_per_node = own


def check_pending(args: argparse.Namespace, launcher: Launcher, file: Path, pending: Sequence[Planned]) -> None:
    """Ask the launcher whether it can start all of these. Raises UsageError; a new sweep is then gone."""
    sweep = Sweep.read(file)
    try:
        launcher.check(sweep.cluster, [task(sweep, file.parent, planned).job() for planned in pending])
    except UsageError:
        if not args.resume:
            file.unlink()
        raise


def goes_on(args: argparse.Namespace, run_id: str) -> str:
    """The command that waits for what was submitted."""
    words = ["sweep", "run", "--resume", run_id, "--output-dir", str(args.output_dir), *launcher_words(args)]
    return command_text(words)
