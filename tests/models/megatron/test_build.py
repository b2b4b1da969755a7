"""Building a model: it leaves torch and the log unchanged, and weights have the given dtype."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from refit.config.shape import Dtype, LatentAttention
from refit.errors import UnavailableError, UsageError
from refit.models.megatron import compat
from refit.models.megatron.build import build_model, check_transformer_impl
from tests.models.megatron.small import LATENT, MOE, SEQUENTIAL, built, layout, playing, spec

QUIET_BUILD = """
import logging
logging.basicConfig(level=logging.INFO)
from tests.models.megatron.small import LATENT, built, layout, playing, spec
from refit.models.megatron.sharding import read_weights
import refit.bench.engines.megatron
with playing(0, 4):
    read_weights(built(LATENT, layout(tp=2, ep=2)))
"""


@pytest.mark.slow
def test_import_and_build_are_silent() -> None:
    """With Python's own warning filter and logging at INFO, as a user's program may have them."""
    result = subprocess.run(
        [sys.executable, "-c", QUIET_BUILD], capture_output=True, text=True, timeout=100, check=True
    )
    assert result.stdout + result.stderr == ""


def test_torch_is_left_as_it_was() -> None:
    before = (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.synchronize)
    with playing(0, 2):
        built(replace(MOE, tied_embeddings=True), layout(pp=2))
    assert (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.synchronize) == before


@pytest.mark.parametrize("dtype", list(Dtype))
def test_parameters_have_the_dtype_asked_for(dtype: Dtype) -> None:
    with playing(0, 1):
        model = built(SEQUENTIAL, layout(), dtype=dtype)
    assert model is not None
    assert {parameter.dtype for parameter in model.module.parameters()} == {getattr(torch, dtype.value)}
    assert not model.module.training


def test_rank_outside_the_side_builds_nothing() -> None:
    with playing(5, 8):
        assert built(MOE, layout(tp=2, ep=2)) is None


def test_transformer_engine_needs_cuda() -> None:
    with pytest.raises(UnavailableError, match="need CUDA, the device is cpu"):
        build_model(MOE, replace(spec(layout()), transformer_impl="transformer_engine"), None, device="cpu")
    with pytest.raises(UsageError, match="'te': choose local or transformer_engine"):
        check_transformer_impl("te", torch.device("cuda"))


@pytest.mark.skipif(compat.has_transformer_engine(), reason="it is installed")
def test_transformer_engine_that_is_missing() -> None:
    with pytest.raises(UnavailableError, match="pip install 'transformer-engine"):
        check_transformer_impl("transformer_engine", torch.device("cuda"))


@pytest.mark.skipif(compat.megatron_version() < (0, 19), reason="0.16 builds it")
def test_latent_query_norm_without_rank_is_refused() -> None:
    with playing(0, 1), pytest.raises(UnavailableError, match="give a rank, leave the norm out"):
        built(replace(LATENT, mla=LatentAttention(None, 16, 8, 8, 8)), layout())
