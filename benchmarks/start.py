"""Ranks that are forked against ranks that are spawned: the time to the end of the first refit, and their memory then.

python -m benchmarks.start [--ranks 8 64] [--turns 3]

A tiny model on CPU ranks over gloo, half of them source, half destination; both ways in turn. Memory is that of
/proc/PID/smaps_rollup: private pages of each rank, and the proportional shares of all ranks and their launcher.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from refit.commands.run import STARTS
from refit.launch.base import Job
from refit.launch.host import Stop, ThisProcess
from refit.launch.local import LocalLauncher
from refit.results.result import read_result

FIRST_REFIT = "refit 1/"
"""What the line of the first refit begins with."""


NUM_REFITS = 800
"""By rank of a run: enough to look at its processes before it ends, and with many of them no minutes more."""


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the command to the end of the first refit, those of each phase on the slowest ranks, and bytes then.

    `private_bytes` is the mean over the ranks, `total_bytes` what ranks and launcher take together.
    """

    seconds: float
    phases: dict[str, float]
    private_bytes: float
    total_bytes: int


def flags(num_ranks: int) -> list[str]:
    """TP2 EP2 to EP4 where there are enough ranks."""
    half = num_ranks // 2
    found = ["--model", "tiny", "--refit-method", "gloo", "--num-benchmark-warmup", "0"]
    found += ["--num-benchmark-iterations", str(max(5, NUM_REFITS // num_ranks)), "--source-world-size", str(half)]
    tp = min(2, half)
    found += ["--tensor-model-parallel-size", str(tp), "--expert-model-parallel-size", str(min(2, half // tp))]
    found += ["--destination-world-size", str(half), "--rl-inference-tensor-model-parallel-size", "1"]
    return [*found, "--rl-inference-expert-model-parallel-size", str(min(4, half))]


def measured(way: str, num_ranks: int) -> Start:
    """Start ranks and look at them after the first of their refits."""
    launcher = LocalLauncher(ThisProcess(Stop()), os.environ)
    launcher.start = way
    with tempfile.TemporaryDirectory() as folder:
        words = (*flags(num_ranks), "--output-dir", folder, "--run-name", "start")
        command = launcher.command(Job(1, num_ranks, Path(folder) / "start", words))
        begin = time.perf_counter()
        process = subprocess.Popen(  # of ranks that run: their processes are looked at
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        while not (line := process.stdout.readline()).startswith(FIRST_REFIT):
            lines.append(line)
            if not line:
                raise RuntimeError(f"{way}: no refit:\n{''.join(lines)}{process.communicate()[1]}")
        seconds = time.perf_counter() - begin
        (launcher,) = children(process.pid)
        ranks = children(launcher)
        assert len(ranks) == num_ranks, (len(ranks), num_ranks)
        private = [memory(pid, "Private_Clean", "Private_Dirty") for pid in ranks]
        total = sum(memory(pid, "Pss") for pid in [launcher, *ranks])
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{way}: {errors}")
        refit = read_result(Path(folder) / "start.json").refit
    assert refit is not None
    return Start(seconds, refit.start_s, sum(private) / num_ranks, total)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that have not ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(pid: int, *fields: str) -> int:
    """Bytes of the given fields of /proc/PID/smaps_rollup together."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE) if name in fields
    )


def show(way: str, num_ranks: int, start: Start) -> None:
    parts = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in start.phases.items())
    print(
        f"{num_ranks} ranks, {way}: {start.seconds:.1f} s to the end of the first refit, private memory per rank "
        f"{start.private_bytes / 1e6:.0f} MB, all together {start.total_bytes / 1e9:.2f} GB ({parts})",
        flush=True,
    )


def ratio(found: dict[str, list[Start]], of: Callable[[Start], float]) -> float:
    """Median of the forked starts to that of the spawned ones."""
    return median(map(of, found["fork"])) / median(map(of, found["spawn"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--starts", nargs="+", choices=sorted(STARTS), default=sorted(STARTS))
    args = parser.parse_args()
    for num_ranks in args.ranks:
        found: dict[str, list[Start]] = {way: [] for way in args.starts}
        for _ in range(args.turns):
            for way, starts in found.items():
                starts.append(measured(way, num_ranks))
                show(way, num_ranks, starts[-1])
        if len(found) == 2:
            times, private = ratio(found, lambda start: start.seconds), ratio(found, lambda start: start.private_bytes)
            print(f"{num_ranks} ranks, fork to spawn: {times:.2f} x time, {private:.2f} x private memory per rank")
    return 0


if __name__ == "__main__":
    sys.exit(main())
