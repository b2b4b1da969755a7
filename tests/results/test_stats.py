"""The median's confidence interval."""

from __future__ import annotations

import math
import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from refit.results.stats import CONFIDENCE, LEAST_FOR_INTERVAL, STABLE_WIDTH, stability

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=LEAST_FOR_INTERVAL, max_size=60)

RANKS = {6: 1, 8: 1, 9: 2, 12: 3, 20: 6, 25: 8, 30: 10, 50: 18, 100: 40}
"""Samples -> the rank of the 95 % interval's lower end: tables of the sign test (Conover, Practical Nonparametric
Statistics, 3rd edition, table A3)."""


def test_the_ranks_are_those_of_the_tables() -> None:
    for num_samples, rank in RANKS.items():
        found = stability([float(value) for value in range(1, num_samples + 1)])
        assert (found.low_s, found.high_s) == (rank, num_samples + 1 - rank), num_samples


@given(TIMES)
def test_the_interval_encloses_the_median_with_its_confidence(times: list[float]) -> None:
    found = stability(times)
    assert found.low_s is not None
    assert found.high_s is not None
    assert found.confidence is not None
    assert found.low_s <= statistics.median(times) <= found.high_s
    below = sorted(times).index(found.low_s)  # of equal samples the first: no more than the rank
    tail = sum(math.comb(len(times), count) for count in range(below + 1)) / 2 ** len(times)
    assert CONFIDENCE <= found.confidence <= 1 - 2 * tail + 1e-12 or times.count(found.low_s) > 1
    assert found.is_stable == (found.width is not None and found.width <= STABLE_WIDTH)


def test_it_covers_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(3)
    rounds = [stability([draw.expovariate(1.0) for _ in range(15)]) for _ in range(2000)]
    covered = sum((found.low_s or 0) <= math.log(2) <= (found.high_s or 0) for found in rounds)
    assert 0.95 < covered / len(rounds) < 0.985  # 0.965 is the confidence of 15 samples


def test_too_few_samples_are_never_stable() -> None:
    for num_samples in range(LEAST_FOR_INTERVAL):
        found = stability([1.0] * num_samples)
        assert (found.num_refits, found.is_stable, found.width) == (num_samples, False, None)
    assert stability([1.0] * LEAST_FOR_INTERVAL).is_stable


def test_many_samples() -> None:
    found = stability([1.0 + 0.2 * (index % 2) + index * 1e-9 for index in range(5000)])
    assert not found.is_stable
    assert found.confidence is not None
    assert 0.95 <= found.confidence < 0.953
