"""Initial weights of an FP8 side: codes and scales of what other sides have."""

from __future__ import annotations

import pytest
import torch

from refit.bench.initial_weights import initialise
from refit.config.quantisation import Quantisation, scale_key
from refit.encodings.fp8.oracle import Fp8Part
from refit.encodings.fp8.reference import dequantise, quantise
from refit.memory.weights import LocalShard, LocalWeights
from refit.models.quantised import QuantisedModel
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from tests.encodings.fp8.test_program import Model

SPECS = [
    TensorSpec("decoder.layers.0.linear_fc1.weight", (300, 256), "bfloat16"),
    TensorSpec("decoder.layers.0.experts.linear_fc2.weight", (3, 256, 384), "bfloat16", stacked=True),
    TensorSpec("decoder.layers.0.input_layernorm.weight", (256,), "bfloat16"),
    TensorSpec("embedding.word_embeddings.weight", (64, 256), "bfloat16"),
]
CASES = [Quantisation("fp8-block", "amax"), Quantisation("mxfp8", "ceil")]


def plain() -> LocalWeights:
    memory = ((spec, torch.empty(spec.shape, dtype=torch.bfloat16)) for spec in SPECS)
    return LocalWeights([LocalShard(spec, Box.whole(spec.shape), data, data) for spec, data in memory])


def by_key(weights: LocalWeights) -> dict[str, torch.Tensor]:
    return {shard.tensor.key: shard.view for shard in weights}


@pytest.mark.parametrize("quantisation", CASES, ids=lambda each: each.dtype)
def test_an_fp8_side_has_the_codes_and_scales_of_the_same_values(quantisation: Quantisation) -> None:
    weights = QuantisedModel(Model(plain()), quantisation).weights
    assert weights is not None
    initialise(weights, Fp8Part(quantisation))
    unquantised = plain()
    initialise(unquantised)
    found, values = by_key(weights), by_key(unquantised)
    for spec in SPECS:
        if not quantisation.quantises(spec.key, spec.shape):
            assert torch.equal(found[spec.key], values[spec.key])
            continue
        held = [found[spec.key], found[scale_key(spec.key)], values[spec.key]]
        for codes, scales, matrix in zip(*held, strict=True) if len(spec.shape) > 2 else [held]:
            expected = quantise(matrix, quantisation)
            assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.parametrize("quantisation", CASES, ids=lambda each: each.dtype)
def test_passes_compute_with_codes_times_scales_and_their_memory_is_given_back(quantisation: Quantisation) -> None:
    memory = plain()
    model = QuantisedModel(Model(memory), quantisation)
    weights, data = model.weights, by_key(memory)[SPECS[0].key]
    assert weights is not None
    assert data.untyped_storage().nbytes() == 0
    initialise(weights, Fp8Part(quantisation))
    model.prepare_infer()
    held = by_key(weights)
    product = dequantise(held[SPECS[0].key], held[scale_key(SPECS[0].key)], quantisation.format)
    assert torch.equal(data, product.to(torch.bfloat16))
    model.infer(torch.zeros(1, 4))
    assert data.untyped_storage().nbytes() > 0
    model.forward(torch.zeros(1, 4))
    assert data.untyped_storage().nbytes() == 0
