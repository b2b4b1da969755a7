"""The arithmetic of every rule against exact fractions and numpy, and what rules do at the ends of their range."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.quantisation import Quantisation
from refit.encodings.fp8.batch import QuantiseBatch
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.reference import dequantise, quantise
from tests.encodings.fp8.weights import RULES, special_blocks, special_values

EVERY_AMAX = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
"""Every positive finite bfloat16, subnormals included."""


def scales_of(quantisation: Quantisation, amax: torch.Tensor) -> torch.Tensor:
    """The scale of blocks that hold one value each, `[num_blocks]`."""
    block = quantisation.format
    row = torch.zeros(1, len(amax) * block.columns, dtype=torch.bfloat16)
    row[0, :: block.columns] = amax
    return quantise(row, quantisation).scales[0]


def exact_exponent(amax: float) -> int:
    """ceil(log2(amax / 448)), in integers."""
    ratio = Fraction(amax) / 448
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    while Fraction(2) ** (exponent - 1) >= ratio:
        exponent -= 1
    return exponent


def test_ceil_rounds_the_exponent_up_for_every_bfloat16() -> None:
    found = scales_of(Quantisation("mxfp8", "ceil"), EVERY_AMAX).view(torch.uint8).tolist()
    wanted = [min(max(exact_exponent(value) + 127, 0), 254) for value in EVERY_AMAX.double().tolist()]
    assert found == wanted


def test_ocp_floor_is_the_exponent_less_eight_for_every_bfloat16() -> None:
    found = scales_of(Quantisation("mxfp8", "ocp-floor"), EVERY_AMAX).view(torch.uint8).tolist()
    wanted = [max(math.frexp(value)[1] - 1 - 8 + 127, 0) for value in EVERY_AMAX.double().tolist()]
    assert found == wanted


def test_pow2_is_the_least_power_of_two_that_does_not_saturate() -> None:
    normal = EVERY_AMAX[EVERY_AMAX >= 2.0**-110]
    found = scales_of(Quantisation("fp8-block", "pow2"), normal).double()
    assert found.tolist() == [2.0 ** exact_exponent(value) for value in normal.double().tolist()]


def test_amax_rules_divide_as_numpy_does() -> None:
    amax = EVERY_AMAX.float().numpy()
    found = scales_of(Quantisation("fp8-block", "amax"), EVERY_AMAX).numpy()
    assert np.array_equal(found, np.maximum(amax, np.float32(1e-10)) / np.float32(448))
    normal = amax >= 2.0**-110
    inverse = scales_of(Quantisation("fp8-block", "amax-inverse"), EVERY_AMAX).numpy()[normal]
    assert np.array_equal(inverse, np.float32(1) / (np.float32(1) / amax[normal] * np.float32(448)))


@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.rule)
def test_codes_are_the_nearest_and_zeros_stay_zeros(quantisation: Quantisation) -> None:
    weights = special_blocks(quantisation)
    done = quantise(weights, quantisation)
    assert done.is_finite.all()
    assert done.codes.float().isfinite().all()
    assert (done.codes.float()[weights == 0] == 0).all()
    usable = (weights.abs().float() >= 2.0**-100) & (weights.abs() < 2.0**127)  # 256 x 2**120 is not a float32
    error = (dequantise(done.codes, done.scales, quantisation.format) - weights.float()).abs()
    # Half a unit of a normal code is 1/16 of it at most; of a subnormal one, 2**-10 of the scale. ocp-floor saturates.
    allowed = weights.abs().float() * (1 / 8 if quantisation.rule == "ocp-floor" else 1.0001 / 16)
    scale = dequantise(torch.ones_like(weights).to(torch.float8_e4m3fn), done.scales, quantisation.format)
    assert (error[usable] <= torch.maximum(allowed, scale * 2.0**-10 * 1.0001)[usable]).all()


def test_rules_differ_in_their_codes() -> None:
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rules in (RULES[:3], RULES[3:]):
        codes = [quantise(weights, rule).codes.view(torch.uint8) for rule in rules]
        scales = [quantise(weights, rule).scales.float() for rule in rules]
        for one in range(len(rules)):
            for other in range(one):
                assert not torch.equal(codes[one], codes[other]) or not torch.equal(scales[one], scales[other])


def test_half_a_block_quantised_alone_differs() -> None:
    """Why a shard of 64 rows cannot be quantised at its source."""
    weights = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights[127, 127] = 30.0
    rule = Quantisation("fp8-block", "amax")
    whole, half = quantise(weights, rule).codes[:64], quantise(weights[:64], rule).codes
    assert (whole.view(torch.uint8) != half.view(torch.uint8)).float().mean() > 0.3


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(RULES), st.integers(1, 3), st.integers(1, 3), st.integers(0, 200), st.integers(0, 1000))
def test_blocks_are_quantised_by_themselves(rule: Quantisation, rows: int, columns: int, cut: int, seed: int) -> None:
    """Any box of whole blocks gives the codes and scales that the whole matrix has there, ragged ends included."""
    block = rule.format
    ragged = 0 if block.whole else cut % block.columns
    weights = special_values(rows * block.rows + ragged % block.rows, columns * block.columns + ragged, seed)
    whole = quantise(weights, rule)
    first = ((rows - 1) * block.rows, (columns - 1) * block.columns)
    part = quantise(weights[first[0] :, first[1] :], rule)
    assert torch.equal(part.codes.view(torch.uint8), whole.codes[first[0] :, first[1] :].view(torch.uint8))
    assert torch.equal(part.scales.float(), whole.scales[rows - 1 :, columns - 1 :].float())


@pytest.mark.parametrize("rule", RULES, ids=lambda each: each.rule)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_reported(rule: Quantisation, value: float) -> None:
    weights = special_values(128, 256, seed=1)
    block = rule.format
    shapes = (weights.shape, (-(-128 // block.rows), 256 // block.columns))
    codes = torch.empty(shapes[0], dtype=torch.float8_e4m3fn)
    scales = torch.empty(shapes[1], dtype=getattr(torch, block.scale_dtype))
    flags = torch.zeros(1, dtype=torch.int32)
    batch = QuantiseBatch([Matrix("layers.0.w", weights, codes, scales)], rule, flags)
    batch.run()
    assert flags.tolist() == [0]
    weights[100, 200] = value
    batch.run()
    assert codes[100, 200].float().isnan()
    assert scales[100 // block.rows, 200 // block.columns].float().isnan()
    assert flags.tolist() == [1]
