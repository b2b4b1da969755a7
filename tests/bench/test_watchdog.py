"""How long a rank may be silent, and who is named over a store that is not the default group's.

What the watchdog does in a job of torchrun: tests/ranks/test_torchrun.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore  # type: ignore[attr-defined]

from refit.bench import watchdog
from refit.bench.watchdog import SILENCE_S, Failure, Watchdog, silence_s
from refit.errors import ExitCode, UsageError
from refit.transport.ranks import Ranks
from tests.ranks.pool import RankError, RankPool


@pytest.mark.parametrize(("ranks", "cores", "expected_s"), [(1, 2, SILENCE_S), (16, 2, SILENCE_S), (64, 2, 60.0)])
def test_ranks_that_crowd_the_cores_may_be_silent_for_longer(
    ranks: int, cores: int, expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert silence_s() == expected_s


PROCESSES = (5, 2, 7)
"""Those that watch one another, in the order of their ranks; the last one fails. The default group has eight."""


def _watch(process: int, folder: Path, way: str) -> str:
    """Writes what this rank has been told of the failure, and whether it was the one to report it, to `folder`."""
    if process not in PROCESSES:
        return "apart"
    rank, size = PROCESSES.index(process), len(PROCESSES)
    watchdog.SILENCE_S = 5.0
    ranks = Ranks.meet(rank, size, FileStore(str(folder / "store"), size))

    def note(kind: str) -> Any:
        return lambda failure: (folder / f"{kind}-{rank}").write_text(json.dumps(asdict(failure)))

    watched = Watchdog(ranks, 100.0, on_failure=note("reported"), on_exit=note("told"))
    watched.start()
    watched.phase("refit")
    if rank == size - 1:
        # The others have begun to watch, so that a rank's silence is seen.
        ranks.store.wait([f"refit/beat/{other}" for other in range(size)])
        time.sleep(2 * watchdog.BEAT_S)
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        watched.fail(UsageError("it broke"))
    time.sleep(60)
    return "not ended"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["failed", "killed"])
def test_ranks_with_a_store_of_their_own_agree_on_the_one_that_failed(
    ranks: RankPool, tmp_path: Path, way: str
) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(_watch, tmp_path, way)
    assert str(caught.value).splitlines() == [f"rank {process}: died" for process in sorted(PROCESSES)]
    told = {path.name: Failure(**json.loads(path.read_text())) for path in tmp_path.glob("told-*")}
    assert set(told) == {"told-0", "told-1"} | ({"told-2"} if way == "failed" else set())
    assert len(list(tmp_path.glob("reported-*"))) == 1
    assert len(set(told.values())) == 1
    failure = told["told-0"]
    expected = (2, "refit", ExitCode.USAGE, False) if way == "failed" else (2, "refit", ExitCode.FAILED, True)
    assert (failure.rank, failure.phase, failure.exit_code, failure.silent) == expected
