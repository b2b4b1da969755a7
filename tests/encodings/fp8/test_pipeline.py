"""Groups of matrices follow the copies: each is quantised once, before the first reader, after the last writer."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.quantisation import Quantisation
from refit.encodings.fp8.groups import Gather, Groups, Job
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.pipeline import OnArrival, OnDemand
from refit.encodings.fp8.reference import quantise
from refit.errors import RefitError
from refit.memory.weights import Part
from refit.plan.box import Box
from tests.encodings.fp8.weights import special_values

RULE = Quantisation("mxfp8", "ceil")
KEYS = ("a", "b")
EXPERTS, ROWS, COLUMNS = 2, 6, 64


def job(key: str, box: Box, seed: int, *, gathered: bool = False) -> Job:
    """A matrix of random weights; gathered ones lie in two views, and are garbage until they are copied together."""
    weights = special_values(*box.extents[-2:], seed)
    gather = None
    if gathered:
        half = COLUMNS // 2
        whole = torch.full_like(weights, 1.0)
        parts = (whole[:, :half], whole[:, half:])
        gather = Gather(whole, parts, (weights[:, :half], weights[:, half:]))
        weights = whole
    codes = torch.zeros(weights.shape, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(weights.shape[0], COLUMNS // 32, dtype=torch.float8_e8m0fnu)
    return Job(box, Matrix(key, weights, codes, scales), gather)


def jobs(seed: int) -> list[Job]:
    """Matrices that tile the tensors `a` and `b`, `[experts, rows, columns]`, cut along their rows."""
    dice = random.Random(seed)
    found = []
    for key in KEYS:
        for expert in range(EXPERTS):
            cut = dice.randint(1, ROWS - 1)
            for begin, end in ((0, cut), (cut, ROWS)):
                box = Box((expert, begin, 0), (1, end - begin, COLUMNS))
                found.append(job(key, box, dice.randint(0, 99), gathered=dice.random() < 0.3))
    return found


def units(seed: int) -> list[list[Part]]:
    """All elements of both tensors as parts, dealt out to several batches of copies; some parts span all experts."""
    dice = random.Random(seed)
    parts: list[Part] = []
    for key in KEYS:
        cuts = [0, *sorted(dice.sample(range(1, ROWS), 2)), ROWS]
        for begin, end in itertools.pairwise(cuts):
            whole = Box((0, begin, 0), (EXPERTS, end - begin, COLUMNS))
            parts += [(key, box) for box in (whole.split(EXPERTS) if dice.random() < 0.5 else [whole])]
    dealt: list[list[Part]] = [[] for _ in range(dice.randint(1, 6))]
    for part in parts:
        dice.choice(dealt).append(part)
    return [each for each in dealt if each]


def is_done(one: Job) -> bool:
    expected = quantise(one.matrix.weights, RULE)
    return torch.equal(one.matrix.codes.view(torch.uint8), expected.codes.view(torch.uint8)) and torch.equal(
        one.matrix.scales.view(torch.uint8), expected.scales.view(torch.uint8)
    )


def overlap(one: Job, parts: list[Part]) -> bool:
    return any(key == one.matrix.key and box.intersect(one.box) is not None for key, box in parts)


def wiped(all_jobs: list[Job]) -> None:
    for one in all_jobs:
        one.matrix.codes.view(torch.uint8).fill_(0xAA)


def groups() -> Groups:
    return Groups("quantise", torch.device("cpu"), RULE)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_what_is_read_has_been_quantised_and_no_more(seed: int, dice: random.Random) -> None:
    all_jobs, copies = jobs(seed), units(seed)
    pipeline = OnDemand(groups(), lambda part: part, lambda: all_jobs)
    hooks = [pipeline.before_reading(parts) for parts in copies]
    for _ in range(2):
        wiped(all_jobs)
        pipeline.begin()
        assert not any(is_done(one) for one in all_jobs)
        for number in dice.sample(range(len(copies)), len(copies)):
            hook = hooks[number]
            assert hook is not None
            hook()
            assert all(is_done(one) for one in all_jobs if overlap(one, copies[number]))
        pipeline.groups.finish()
        assert all(is_done(one) for one in all_jobs)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_what_has_arrived_is_quantised_as_soon_as_it_is_complete(seed: int, dice: random.Random) -> None:
    all_jobs, copies = jobs(seed), units(seed)
    pipeline = OnArrival(groups(), lambda part: part, lambda: all_jobs)
    hooks = [pipeline.after_writing(parts) for parts in copies]
    for _ in range(2):
        wiped(all_jobs)
        pipeline.begin()
        missing = dict(enumerate(copies))
        for number in dice.sample(range(len(copies)), len(copies)):
            hook = hooks[number]
            assert hook is not None
            hook()
            del missing[number]
            for one in all_jobs:
                assert is_done(one) == (not any(overlap(one, parts) for parts in missing.values()))
        pipeline.groups.finish()


def test_the_first_message_needs_only_its_own_matrices() -> None:
    """What makes quantising hide: one message does not wait for what another one sends."""
    all_jobs = jobs(0)
    pipeline = OnDemand(groups(), lambda part: part, lambda: all_jobs)
    hooks = [pipeline.before_reading([(one.matrix.key, one.box)]) for one in all_jobs]
    wiped(all_jobs)
    pipeline.begin()
    for number, hook in enumerate(hooks):
        assert [is_done(one) for one in all_jobs] == [True] * number + [False] * (len(all_jobs) - number)
        assert hook is not None
        hook()


def test_equal_parts_have_one_unit_and_other_tensors_have_none() -> None:
    made: list[list[Job]] = []

    def make() -> list[Job]:
        made.append(jobs(1))
        wiped(made[-1])
        return made[-1]

    pipeline = OnArrival(groups(), lambda part: part if part[0] in KEYS else None, make)
    everything = [("a", Box((0, 0, 0), (EXPERTS, ROWS, COLUMNS))), ("b", Box((0, 0, 0), (EXPERTS, ROWS, COLUMNS)))]
    assert pipeline.after_writing([("router", Box((0,), (4,)))]) is None
    hooks = [pipeline.after_writing(everything) for _ in range(2)]  # a transport binds again
    pipeline.begin()
    pipeline.rebind()  # and so do weights that have moved, as the transport finds when it has begun
    assert hooks[1] is not None
    hooks[1]()
    assert [any(is_done(one) for one in each) for each in made] == [False, True]
    assert all(is_done(one) for one in made[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(value: float) -> None:
    all_jobs = jobs(2)
    all_jobs[-1].matrix.weights[0, 0] = value
    if (gather := all_jobs[-1].gather) is not None:
        gather.views[0][0, 0] = value
    pipeline = OnDemand(groups(), lambda part: part, lambda: all_jobs)
    hooks = [pipeline.before_reading([(key, Box((0, 0, 0), (EXPERTS, ROWS, COLUMNS)))]) for key in KEYS]
    pipeline.begin()
    assert hooks[0] is not None
    hooks[0]()
    pipeline.groups.finish()
    assert hooks[1] is not None
    hooks[1]()
    with pytest.raises(RefitError, match=r"1 tensors have NaN or infinity.*: b: check"):
        pipeline.groups.finish()


def test_what_was_not_finite_is_named_though_a_peer_has_moved_since() -> None:
    all_jobs = jobs(2)
    all_jobs[0].matrix.weights[0, 0] = float("nan")
    if (gather := all_jobs[0].gather) is not None:
        gather.views[0][0, 0] = float("nan")
    pipeline = OnDemand(groups(), lambda part: part, lambda: all_jobs)
    hooks = [pipeline.before_reading([(key, Box((0, 0, 0), (EXPERTS, ROWS, COLUMNS)))]) for key in KEYS]
    wiped(all_jobs)
    pipeline.begin()
    assert hooks[0] is not None
    hooks[0]()
    pipeline.rebind()
    wiped([one for one in all_jobs if one.matrix.key == "a"])
    for hook in hooks:
        assert hook is not None
        hook()
    assert not any(is_done(one) for one in all_jobs if one.matrix.key == "a"), "quantised twice"
    assert all(is_done(one) for one in all_jobs if one.matrix.key == "b")
    with pytest.raises(RefitError, match=r"1 tensors have NaN or infinity.*: a: check"):
        pipeline.groups.finish()
