"""Versions: when a source sends everything, and why; and what a destination refuses."""

from __future__ import annotations

import pytest
import torch

from refit.errors import RefitError
from tests.encodings.delta.test_message import whole_pair
from tests.encodings.delta.weights import Pair, bits


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def test_the_first_refit_is_full_and_says_so() -> None:
    pair, _, _ = whole_pair()
    fresh = Pair(pair.source, pair.destination, pair.pieces)
    fresh.begin()
    assert fresh.sent.reason == "nothing was sent before"


def test_a_failure_in_the_middle_is_followed_by_a_full_refit() -> None:
    for failing in ("source", "destination"):
        pair, new, held = whole_pair()
        pair.begin()
        pair.pack()
        if failing == "destination":
            pair.sent.finish()  # the source believes it
        else:
            pair.apply()
            pair.received.finish()
        pair.begin()
        assert pair.sent.is_full
        assert pair.sent.reason in ("the refit before did not end", "rank 1: the refit before did not end")
        pair.pack()
        pair.apply()
        pair.finish()
        assert equal(new, held)
        pair.begin()
        assert pair.sent.reason is None


def test_a_destination_that_missed_a_version_gets_a_full_refit() -> None:
    pair, new, held = whole_pair()
    pair.received.weights.version = 0
    pair.refit()
    assert pair.sent.reason == "rank 1 has version 0, not 1"
    assert equal(new, held)


def test_a_joiner_gets_a_full_refit() -> None:
    pair, new, held = whole_pair()
    pair.received.weights.forget("it has just come")
    held.zero_()
    pair.refit()
    assert pair.sent.reason == "rank 1: it has just come"
    assert equal(new, held)


def test_changes_to_another_base_are_refused() -> None:
    pair, _, held = whole_pair()
    pair.begin()
    pair.received.expected = -1
    pair.pack()
    before = held.clone()
    with pytest.raises(RefitError, match="its changes are to version 1, these weights have no version"):
        pair.apply()
    assert equal(before, held)
