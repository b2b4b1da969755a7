"""What runs in each pod: torchrun with this node's ranks, then, in the first pod, the result as lines of its log.

Its arguments are `refit.launch.kubernetes.manifests.pod_arguments`. It ends with torchrun's exit code.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from refit.errors import CANCELLED, RefitError, UsageError
from refit.launch.base import preload
from refit.report.terminal.console import show, show_error

RESULT = "#refit-result"
"""What a line with a part of the result begins with: its number, how many there are, and the part."""

RESULT_LINE = re.compile(rf"{RESULT} ([0-9]+) ([0-9]+) (\S*)")
PART_CHARACTERS = 12000
"""A container's runtime cuts longer lines than 16 KiB."""

DNS_PATIENCE_S = 300.0
"""How long the first pod may take to have a name, while images are pulled."""

SET_BY_OPERATORS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun gives each rank. Some operators set them for the pod, where they mean something else."""


def main(arguments: Sequence[str]) -> int:
    """Run this node's ranks. Raises RefitError before any is started."""
    parser = argparse.ArgumentParser(prog="pod", allow_abbrev=False)
    for name in ("nodes", "ranks-per-node", "node", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("master", "rendezvous", "address", "id", "result"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("folder", "flags"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(arguments)
    flags = args.flags.read_text(encoding="utf-8").splitlines()
    result = args.folder / f"{args.result}.json"
    if args.node == 0 and result.exists():
        raise UsageError(f"{result} is there already, and no result is overwritten: take another --run-id")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.nodes > 1:
        wait_for_name(args.master, DNS_PATIENCE_S)
    code = _run(torchrun(args, flags), environment(os.environ))
    if args.node == 0 and result.exists():
        for line in result_lines(result.read_bytes()):
            show(line)
    return code


def torchrun(args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """The command line of torchrun on this node."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={args.nodes}"]
    words += [f"--nproc-per-node={args.ranks_per_node}"]
    if args.rendezvous == "static":
        words += [f"--node-rank={args.node}", f"--master-addr={args.master}", f"--master-port={args.port}"]
    else:
        words += [f"--rdzv-backend={args.rendezvous}", f"--rdzv-endpoint={args.master}:{args.port}"]
        words += [f"--rdzv-id={args.id}", f"--rdzv-conf=is_host={int(args.node == 0)}"]
        # Others may not know this pod by its name.
        words += [f"--local-addr={args.address}"]
    logs = args.folder / f"{args.result}_ranks" / f"node{args.node}"
    words += [f"--log-dir={logs}", "--tee=3", "-m", "refit.cli", *flags]
    return words


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun: those of this pod without what its operator sets, since all of it is in arguments."""
    kept = {name: value for name, value in environ.items() if not name.startswith("PET_")}
    for name in SET_BY_OPERATORS:
        kept.pop(name, None)
    return {
        **kept,
        **preload(environ),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank${rank}]:",
        "PYTHONUNBUFFERED": "1",
    }


def wait_for_name(host: str, patience_s: float) -> None:
    """Wait until `host` has an address. Raises RefitError where it has none after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RefitError(
                    f"the first pod's name {host} has no address after {patience_s:.0f} s ({error.strerror}): is its "
                    "pod running, and does the cluster's DNS know the headless service?"
                ) from None
        time.sleep(1.0)


def result_lines(content: bytes) -> Iterator[str]:
    """A result file as lines of a log."""
    text = base64.b64encode(zlib.compress(content, 9)).decode()
    parts = [text[start : start + PART_CHARACTERS] for start in range(0, len(text), PART_CHARACTERS)]
    for number, part in enumerate(parts):
        yield f"{RESULT} {number} {len(parts)} {part}"


def result_of(lines: Mapping[int, str], num_lines: int) -> bytes | None:
    """The result file whose parts these are; None where one is missing or damaged."""
    if not num_lines or set(lines) != set(range(num_lines)):
        return None
    try:
        return zlib.decompress(base64.b64decode("".join(lines[number] for number in range(num_lines)), validate=True))
    except (ValueError, zlib.error):
        return None


def _run(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run torchrun, and hand on the signal with which Kubernetes ends a pod."""
    process = subprocess.Popen(words, env=environ)
    told = False

    def tell(number: int, _: object) -> None:
        nonlocal told
        told = True
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    code = process.wait()
    if told:
        return CANCELLED
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RefitError as error:
        show_error(str(error))
        sys.exit(int(error.exit_code))
