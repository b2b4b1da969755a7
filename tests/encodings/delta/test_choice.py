"""What `auto` chooses, from what refits before took."""

from __future__ import annotations

import pytest

from refit.config.registry import ENCODINGS
from refit.encodings.delta.choice import LOOK_AGAIN, NUM_TO_DECIDE, Bounds, Past, Way, choose


def play(num: int, changes_s: float, full_s: float, share: float = 0.01, bounds: Bounds | None = None) -> list[Past]:
    """The refits that come of choices where changes take `changes_s`, and everything `full_s`."""
    past: list[Past] = []
    for _ in range(num):
        way = choose(past, bounds)
        seconds = changes_s if way is Way.CHANGES else full_s
        past.append(Past(way, seconds, share if way is Way.CHANGES else None))
    return past


def ways(past: list[Past]) -> list[Way]:
    return [each.way for each in past]


def test_both_are_tried_before_one_is_chosen() -> None:
    tried = [Way.BASE, Way.CHANGES, Way.CHANGES, Way.EVERYTHING, Way.EVERYTHING]
    assert len(tried) == NUM_TO_DECIDE == ENCODINGS["auto"].num_to_decide
    assert ways(play(12, 1.0, 2.0)) == [*tried, Way.BASE, *[Way.CHANGES] * 6]
    assert ways(play(12, 2.0, 1.0)) == [*tried, *[Way.EVERYTHING] * 7]


def test_a_loser_is_looked_at_again_and_costs_little() -> None:
    past = play(NUM_TO_DECIDE + 5 * (LOOK_AGAIN + 2), 2.0, 1.0)[NUM_TO_DECIDE:]
    others = [each.way for each in past if each.way is not Way.EVERYTHING]
    assert others == [Way.BASE, Way.CHANGES] * (len(others) // 2)
    assert len(others) >= 8
    assert sum(each.seconds for each in past) < 1.05 * len(past)


def test_a_share_that_has_fallen_is_found_and_one_that_has_risen_is_believed() -> None:
    past = play(NUM_TO_DECIDE + 2 * LOOK_AGAIN, 2.0, 1.0, share=0.5)
    for _ in range(LOOK_AGAIN + 8):
        way = choose(past)
        past.append(Past(way, 0.1 if way is Way.CHANGES else 1.0, 0.01 if way is Way.CHANGES else None))
    assert ways(past)[-4:] == [Way.CHANGES] * 4
    past.append(Past(Way.CHANGES, 2.0, 0.5))
    assert choose(past) is Way.EVERYTHING


def test_only_refits_of_about_the_last_share_count() -> None:
    past = [*play(10, 0.1, 1.0), *[Past(Way.CHANGES, 1.1, 0.2)] * 2]
    assert choose(past) is Way.EVERYTHING
    assert choose([*past, Past(Way.CHANGES, 0.1, 0.01)]) is Way.CHANGES


def test_what_is_faster_than_the_bound_of_everything_needs_no_trial() -> None:
    past = play(10, 0.1, 1.0, bounds=Bounds(full_s=0.5, find_s=0.01))
    assert ways(past) == [Way.BASE, *[Way.CHANGES] * 9]


@pytest.mark.parametrize("find_s", [0.5, 0.6])
def test_where_comparing_takes_as_long_as_moving_all_nothing_is_compared(find_s: float) -> None:
    assert set(ways(play(10, 0.1, 1.0, bounds=Bounds(full_s=0.5, find_s=find_s)))) == {Way.EVERYTHING}
