"""Waiting for CUDA events with a time limit, on events that are over after so many queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refit.errors import RefitError
from refit.memory.streams import late_peers_error, wait_for_events
from refit.transport.two_sided import nccl
from refit.transport.two_sided.backend import BoundMessage, PendingRound

NEVER = 1 << 62


class Event:
    """A CUDA event that is over at query number `num_queries`."""

    def __init__(self, num_queries: int) -> None:
        self._left = num_queries

    def query(self) -> bool:
        self._left -= 1
        return self._left <= 0


def events(*num_queries: int) -> Any:
    return [Event(number) for number in num_queries]


def test_events_that_end_in_time_leave_none_late() -> None:
    assert wait_for_events(events(1, 5, 2), timeout_s=20.0) == []
    assert wait_for_events([], timeout_s=0.0) == []


def test_events_that_do_not_end_are_returned() -> None:
    assert wait_for_events(events(1, NEVER, 1, NEVER), timeout_s=0.01) == [1, 3]


def test_the_error_names_each_peer_once() -> None:
    assert "rank 4: no end of the exchange with ranks [0, 1] within 2 s" in str(late_peers_error(4, [1, 0, 1], 2.0))


def test_nccl_names_the_peers_of_the_first_unfinished_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "Streams", lambda device: None)
    rounds = [_round(0, event) for event in (*events(1), None)] + [_round(1, *events(NEVER)), _round(2, *events(NEVER))]
    backend = nccl.NcclBackend(7, 0.01, torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(RefitError, match=r"^rank 7: no end of the exchange with ranks \[1, 11\] within 0\.01 s"):
        backend.finish(rounds)


def _round(peer: int, unpacked: Any) -> PendingRound:
    buffer = torch.empty(0, dtype=torch.uint8)
    sends, receives = [BoundMessage(peer, buffer, None)], [BoundMessage(peer + 10, buffer, None)]
    return PendingRound(sends, receives, unpacked=unpacked)
