"""Waiting for what other processes do, and finding them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came about")


def read_until(readline: Callable[[], str], text: str) -> str:
    lines = []
    while line := readline():
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def pid_of_rank(rank: int, directory: Path) -> int:
    """The process of `rank`, forked or started by torchrun, with this test's output directory."""
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes().split(b"\0")
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        if str(directory).encode() in words and (
            name == f"refit rank {rank}" or f"RANK={rank}".encode() in environment
        ):
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")
