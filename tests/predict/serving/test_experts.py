"""Expected work of experts, against counting what random tokens choose."""

from __future__ import annotations

import itertools
import random

import pytest

from refit.predict.serving.experts import Slots


def test_distinct_experts_are_those_that_random_tokens_choose() -> None:
    """Eight experts on two ranks, of which the first has a copy of expert 0 and the second another; top-2."""
    placed, tokens, tries = [(0, 1, 2, 3), (0, 4, 5, 6, 7)], 3, 4000
    slots = Slots.of(placed, [2 / 8] * 8)
    drawn = random.Random(0)
    counted = [0.0, 0.0]
    for _ in range(tries):
        hit: set[tuple[int, int]] = set()
        for _ in range(tokens):
            for expert in drawn.sample(range(8), 2):
                ranks = [rank for rank, held in enumerate(placed) if expert in held]
                hit.add((drawn.choice(ranks), expert))
        for rank, _ in hit:
            counted[rank] += 1 / tries
    assert slots.distinct(tokens).tolist() == pytest.approx(counted, rel=0.03)
    assert sum(slots.pairs(tokens)) == pytest.approx(2 * tokens)
    assert slots.pairs(tokens).tolist() == pytest.approx([tokens * 0.25 * 3.5, tokens * 0.25 * 4.5])


def test_a_token_reaches_no_more_ranks_than_its_choices_do() -> None:
    slots = Slots.of([(0, 1), (2, 3), (4, 5)], [2 / 6] * 6)
    pairs = list(itertools.combinations(range(6), 2))
    exact = [sum(bool({2 * rank, 2 * rank + 1} & set(pair)) for pair in pairs) / len(pairs) for rank in range(3)]
    found = slots.reached([[0], [1], [2]]).tolist()
    assert all(0.9 * most <= chance <= most for chance, most in zip(found, exact, strict=True))
    assert slots.reached([[0, 1, 2]])[0] <= 1


def test_an_expert_that_all_choose_is_always_hit() -> None:
    slots = Slots.of([(0,), (1, 2)], [1.0, 0.5, 0.5])
    assert slots.distinct(1).tolist() == pytest.approx([1.0, 1.0])
    assert slots.reached([[0]])[0] == 1.0
