"""The oracle on FP8 destinations: what it must find, and values that test every kind of block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from refit.bench import oracle
from refit.config.quantisation import Quantisation, scale_key
from refit.encodings.fp8.oracle import Fp8Part
from refit.encodings.fp8.reference import quantise
from refit.memory.weights import LocalShard, LocalWeights
from refit.models.quantised import QuantisedModel
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from tests.encodings.fp8.test_program import Model
from tests.encodings.fp8.weights import RULES

SPEC = TensorSpec("layers.0.fc.weight", (1024, 1024), "bfloat16")
SCALES = scale_key(SPEC.key)


def filled(iteration: int, quantisation: Quantisation) -> torch.Tensor:
    data = torch.zeros(SPEC.shape, dtype=torch.bfloat16)
    oracle.fill(LocalWeights([LocalShard(SPEC, Box.whole(SPEC.shape), data, data)]), iteration, Fp8Part(quantisation))
    return data


def refitted(iteration: int, quantisation: Quantisation, rule: Quantisation | None = None) -> LocalWeights:
    """A destination with what a right refit leaves, by `rule`."""
    data = torch.zeros(SPEC.shape, dtype=torch.bfloat16)
    model = Model(LocalWeights([LocalShard(SPEC, Box.whole(SPEC.shape), data, data)]))
    weights = QuantisedModel(model, quantisation).weights
    assert weights is not None
    done = quantise(filled(iteration, quantisation), rule or quantisation)
    codes, scales = views(weights)
    codes.copy_(done.codes)
    scales.copy_(done.scales)
    return weights


def views(weights: LocalWeights) -> tuple[torch.Tensor, torch.Tensor]:
    by_key = {shard.tensor.key: shard.view for shard in weights}
    return by_key[SPEC.key], by_key[SCALES]


def wrong(
    weights: LocalWeights, quantisation: Quantisation, iteration: int = 3, sample: bool = False
) -> dict[str, int]:
    verdict = oracle.check(weights, {SPEC.key: SPEC}, iteration, part=Fp8Part(quantisation), sample=sample)
    return {each.key: each.num_wrong for each in verdict.wrong}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda each: each.rule)
def test_a_right_refit_has_nothing_wrong(rule: Quantisation) -> None:
    weights = refitted(3, rule)
    assert wrong(weights, rule) == {}
    assert wrong(weights, rule, sample=True) == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda each: each.rule)
@pytest.mark.parametrize("sample", [False, True])
def test_poison_is_found_in_every_element(rule: Quantisation, sample: bool) -> None:
    weights = refitted(3, rule)
    oracle.poison(weights)
    codes, scales = views(weights)
    found = wrong(weights, rule, sample=sample)
    if sample:
        assert set(found) == {SPEC.key, SCALES}
    else:
        assert found == {SPEC.key: codes.numel(), SCALES: scales.numel()}


def poison_one(codes: torch.Tensor, scales: torch.Tensor) -> None:
    scales.view(torch.uint8)[-1, -1] = 0xFF


def swap_two(codes: torch.Tensor, scales: torch.Tensor) -> None:
    scales.copy_(scales.clone().roll(scales.shape[0] // 2, 0))


def neighbours(codes: torch.Tensor, scales: torch.Tensor) -> None:
    scales.copy_(scales.clone().roll(1, 1))


def one_bit(codes: torch.Tensor, scales: torch.Tensor) -> None:
    codes.view(torch.uint8)[513, 77] ^= 1


@pytest.mark.parametrize("rule", RULES, ids=lambda each: each.rule)
@pytest.mark.parametrize(
    ("fault", "key", "least"),
    [(poison_one, SCALES, 1), (swap_two, SCALES, 2), (neighbours, SCALES, 2), (one_bit, SPEC.key, 1)],
)
def test_faults_are_found(
    rule: Quantisation, fault: Callable[[torch.Tensor, torch.Tensor], None], key: str, least: int
) -> None:
    weights = refitted(3, rule)
    fault(*views(weights))
    found = wrong(weights, rule)
    assert set(found) == {key}
    assert found[key] >= least
    if fault in (swap_two, neighbours):
        assert found[key] > views(weights)[1].numel() / 2


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda each: each.rule)
def test_another_rule_or_iteration_is_found(rule: Quantisation) -> None:
    for other in RULES:
        if other.dtype == rule.dtype and other != rule:
            assert set(wrong(refitted(3, rule, other), rule)) >= {SCALES}
    assert set(wrong(refitted(2, rule), rule)) == {SPEC.key, SCALES}


@pytest.mark.parametrize("rule", [RULES[0], RULES[-1]], ids=lambda each: each.rule)
def test_values_have_blocks_of_every_kind(rule: Quantisation) -> None:
    block = rule.format
    data = filled(0, rule).float().abs()
    amax = data.view(1024 // block.rows, block.rows, 1024 // block.columns, block.columns).amax(dim=(1, 3))
    assert (amax == 0).any(), "zeros"
    assert ((amax > 0) & (amax < 2.0**-120)).any(), "subnormals"
    corners = [
        data[row :: block.rows, column :: block.columns]
        for row in (0, block.rows - 1)
        for column in (0, block.columns - 1)
    ]
    assert any(((corner == amax) & (amax > 0)).any() for corner in corners), "the largest value in a corner"
    assert len(amax.unique()) > 0.3 * min(amax.numel(), 1000), "blocks differ"


def test_whole_and_parts_have_equal_values() -> None:
    rule = RULES[0]
    whole = filled(4, rule)
    box = Box((130, 257), (300, 511))
    data = torch.zeros(box.extents, dtype=torch.bfloat16)
    oracle.fill(LocalWeights([LocalShard(SPEC, box, data, data)]), 4, Fp8Part(rule))
    assert torch.equal(data, whole[130:430, 257:768])
