"""Building a model: it leaves torch and the log unchanged, and weights have the given dtype."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from refit.config.shape import Dtype, LatentAttention
from refit.errors import UnavailableError, UsageError
from refit.models.megatron import compat
from refit.models.megatron.build import build_model, check_transformer_impl
from refit.models.megatron.sharding import read_weights
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


def test_parallel_state_is_left_as_it_was() -> None:
    before = dict(vars(parallel_state))
    with playing(0, 2):
        model = built(replace(MOE, mtp_num_layers=1), layout(pp=2, vpp=2))
        assert model is not None
        read_weights(model)
    assert dict(vars(parallel_state)) == before


@pytest.mark.parametrize(("rank", "layers"), [(0, [[0], [2]]), (1, [[1], [3]])])
def test_chunks_of_a_rank_in_their_order(rank: int, layers: list[list[int]]) -> None:
    """The first chunk of the first stage has the embedding; the last chunk of the last stage the output layer, the
    token prediction layer and a second embedding, whose gradients both stages sum."""
    with playing(rank, 2):
        model = built(replace(MOE, mtp_num_layers=1), layout(pp=2, vpp=2))
        assert model is not None
        assert dist.get_process_group_ranks(model.groups.embd) == [0, 1]
    parts: list[Any] = list(model.chunks)
    assert [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in parts] == layers
    assert [chunk.vp_stage for chunk in parts] == [0, 1]
    places = [{name for name in ("embedding", "output_layer", "mtp") if hasattr(chunk, name)} for chunk in parts]
    assert places == ([{"embedding"}, set()] if rank == 0 else [set(), {"embedding", "output_layer", "mtp"}])
    shared = [chunk.embedding.word_embeddings.weight for chunk in parts if hasattr(chunk, "embedding")]
    assert [weight.shared_embedding for weight in shared] == [True]


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
