"""CUDA streams and events: typed wrappers, and waiting on the host with a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from refit.errors import RefitError


def new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """Streams with lower `priority` numbers run first."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    return stream


def is_over(event: torch.cuda.Event) -> bool:
    """Whether all work before the event has ended. Does not wait."""
    return bool(event.query())  # type: ignore[no-untyped-call]


def wait_for_events(events: Sequence[torch.cuda.Event], timeout_s: float) -> list[int]:
    """Wait on the host until all events are over. Returns the indices of those that are not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    for event in events:
        while not is_over(event):
            if time.monotonic() > deadline:
                return [index for index, late in enumerate(events) if not is_over(late)]
            time.sleep(0)
    return []


def late_peers_error(rank: int, peers: Iterable[int], timeout_s: float) -> RefitError:
    """The error of a run on `rank` whose exchange with `peers` has not ended in time."""
    return RefitError(
        f"rank {rank}: no end of the exchange with ranks {sorted(set(peers))} within {timeout_s:g} s (--timeout): "
        "one of them has failed or is slower than that"
    )
