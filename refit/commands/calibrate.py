"""`refit calibrate`: measures the links between ranks, and writes them as a file for `--cluster`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from refit.cli import flag_types
from refit.cli.launch import rank_variables
from refit.commands.run import without_launcher
from refit.config.registry import METHODS, method_of_links
from refit.config.rows import BETWEEN, WITHIN
from refit.errors import ExitCode, UsageError
from refit.report.plans.calibration import calibration_text, cluster_text
from refit.report.terminal.console import show, show_aside

MAX_MIB = 1 << 16
DEFAULTS = {device: tuple(method_of_links(device, where) for where in (WITHIN, BETWEEN)) for device in ("cpu", "cuda")}
"""By device: the methods within hosts and between them."""


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure the links between ranks and write a file for --cluster",
        description="Measure what links within hosts and between them carry, with the transports that refits use: one "
        "pair of ranks, both ways, all ranks at a time, and small refits. Writes the speeds of a rank while all send.",
        epilog="examples:\n  refit calibrate --nproc-per-node 4 --output here.yaml\n"
        "  torchrun --nnodes 2 --nproc-per-node 8 ... -m refit calibrate --device cuda --output hosts.yaml",
    )
    methods = ", ".join(f"{' and '.join(names)} on {device}" for device, names in DEFAULTS.items())
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write; required")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu", help="what holds the bytes; default: cpu")
    parser.add_argument("--within", choices=METHODS, help=f"method within hosts; default: {methods}")
    parser.add_argument("--between", choices=METHODS, help="method between hosts; default: as there")
    parser.add_argument(
        "--mib", type=flag_types.up_to(MAX_MIB), default=64, metavar="N", help="MiB from rank to rank; default: 64"
    )
    parser.add_argument(
        "--times", type=flag_types.up_to(1000), default=5, metavar="N", help="timed runs of each; default: 5"
    )
    parser.add_argument(
        "--timeout",
        type=flag_types.positive,
        default=300,
        metavar="SECONDS",
        help="seconds of a wait; default: 300",
    )
    parser.add_argument(
        "--nproc-per-node", type=flag_types.positive, metavar="N", help="start N ranks here; default: torchrun's"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure as one of torchrun's ranks, or start them. Raises UsageError for methods that cannot do it."""
    within, between = (
        named or own for named, own in zip((args.within, args.between), DEFAULTS[args.device], strict=True)
    )
    for flag, method in (("--within", within), ("--between", between)):
        if args.device not in METHODS[method].devices:
            raise UsageError(f"{flag} {method} moves nothing on {args.device}: give --device {METHODS[method].device}")
    if METHODS[between].single_host:
        raise UsageError(f"--between {between} needs all ranks on one host: use {DEFAULTS[args.device][1]}")
    if args.output.exists():
        raise UsageError(f"--output {args.output} exists: give another name, or remove it")
    if not args.output.parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder {args.output.parent}")
    os.environ.update(rank_variables(os.environ))
    if "RANK" not in os.environ:
        return _start(args)
    from refit.bench import calibration

    is_first = os.environ["RANK"] == "0"
    try:
        found = calibration.run(within, between, args.device, args.mib << 20, args.times, float(args.timeout))
    except UsageError as error:  # the same on all ranks
        if is_first:
            raise
        return int(error.exit_code)
    if is_first:
        args.output.write_text(cluster_text(found) + "\n", encoding="utf-8")
        show(calibration_text(found))
        show_aside(f"written: {args.output}: give it to runs with --cluster {args.output}")
    return int(ExitCode.OK)


def _start(args: argparse.Namespace) -> int:
    """Start ranks of the same command on this machine."""
    if args.nproc_per_node is None or args.nproc_per_node < 2:
        raise UsageError(
            f"{args.nproc_per_node or 'no'} ranks have no links, 2 are needed: give --nproc-per-node 2 or more, or "
            "start refit calibrate with torchrun on each host"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += ["--nproc-per-node", str(args.nproc_per_node), "-m", "refit", "calibrate", f"--output={args.output}"]
    command += [f"--device={args.device}", f"--mib={args.mib}", f"--times={args.times}", f"--timeout={args.timeout}"]
    command += [f"--{side}={name}" for side in ("within", "between") if (name := getattr(args, side)) is not None]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
    assert process.stderr is not None
    for line in without_launcher(each.rstrip("\n") for each in process.stderr):
        show_aside(line)
    return int(ExitCode.OK if process.wait() == 0 else ExitCode.FAILED)
