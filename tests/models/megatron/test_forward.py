"""Equal logical weights give equal logits in every layout, so the stated boxes are the ones Megatron uses."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from refit.config.layout import Layout
from refit.config.shape import LatentAttention, ModelShape
from refit.errors import RefitError
from refit.models.megatron import compat
from refit.models.megatron.build import BuiltModel
from refit.models.megatron.forward import forward_pass
from refit.models.megatron.sharding import read_weights
from tests.models.megatron.small import (
    DENSE,
    LATENT,
    LATENT_EXPERTS,
    MOE,
    SEQUENTIAL,
    built,
    fill,
    layout,
    playing,
    written,
)
from tests.ranks.pool import RankPool

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 250


def forward_logits(model: BuiltModel, tokens: torch.Tensor) -> torch.Tensor | None:
    return forward_pass(model, tokens).logits


def logits_of(rank: int, shape: ModelShape, layouts: list[Layout]) -> list[torch.Tensor | None]:
    """This rank's logits in each layout, weights filled by logical position."""
    results: list[torch.Tensor | None] = []
    for where in layouts:
        model = built(shape, where)
        if model is None:
            results.append(None)
            continue
        fill(read_weights(model))
        results.append(forward_logits(model, TOKENS))
    return results


NO_QUERY_RANK = replace(LATENT, mla=LatentAttention(None, 16, 8, 8, 8), qk_layernorm=False)


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        (MOE, [layout(), layout(tp=2, ep=2, etp=2, first=2), layout(tp=2, ep=2, etp=1, pp=2)]),
        (replace(SEQUENTIAL, qk_layernorm=True), [layout(ep=4), layout(tp=4, ep=2, etp=2), layout(tp=2, ep=2, pp=2)]),
        (LATENT, [layout(), layout(tp=4, ep=4, etp=1, world=4), layout(tp=2, ep=1, etp=2, pp=2, first=4)]),
        (NO_QUERY_RANK, [layout(), layout(tp=2, ep=2, etp=2, pp=2)]),
        (replace(MOE, tied_embeddings=True, swiglu=False), [layout(), layout(tp=2, ep=2, pp=2)]),
        (replace(DENSE, num_query_groups=2), [layout(), layout(tp=4), layout(tp=4, pp=2, vpp=2)]),
        (MOE, [layout(), layout(pp=4), layout(tp=2, pp=2, vpp=2), layout(pp=2, vpp=2, tp=1, ep=4)]),
        (
            replace(DENSE, num_layers=8),
            [layout(), Layout(tp=1, ep=1, etp=1, pp=3, world_size=3, vpp=2, first_stage_layers=2, last_stage_layers=4)],
        ),
        (replace(LATENT, mtp_num_layers=2), [layout(tp=2, ep=2, etp=2), layout(pp=2, vpp=2, tp=2, ep=2)]),
        (replace(LATENT_EXPERTS, add_bias_linear=True), [layout(), layout(tp=2, ep=2), layout(pp=2, ep=2)]),
        (replace(LATENT_EXPERTS, mtp_num_layers=1), [layout(), layout(tp=2, ep=2, etp=2, pp=2, vpp=2)]),
        (replace(DENSE, tied_embeddings=True), [layout(), written("E||t|tttL"), written("E|tt|tt|L", tp=2)]),
        (replace(LATENT, mtp_num_layers=2), [layout(), written("Et*2|tt|mmL"), written("E|t|tt|t|mm|L", ep=1)]),
        (
            replace(MOE, mtp_num_layers=1, tied_embeddings=True),
            [layout(), written("Et|ttt|m|L", tp=2), written("Et|t|t|t|m|L", vpp=2), written("Etttt,m|L", ep=2)],
        ),
        (replace(MOE, mtp_num_layers=1), [layout(), written("Et|t|ttm|L", vpp=2), written("Et|t|t|t|m|L", vpp=3)]),
        (
            replace(DENSE, add_bias_linear=True, normalization="LayerNorm", position_embedding_type="learned_absolute"),
            [layout(), layout(tp=2, pp=2), Layout(tp=1, ep=1, etp=1, pp=3, world_size=3, first_stage_layers=2)],
        ),
    ],
    ids=[
        "grouped",
        "sequential",
        "latent",
        "latent-no-q-rank",
        "tied-not-gated",
        "few-query-groups",
        "virtual-stages",
        "virtual-stages-uneven",
        "token-prediction",
        "latent-experts",
        "latent-experts-everything",
        "no-decoder-layer",
        "token-prediction-alone",
        "token-prediction-tied",
        "token-prediction-beside-the-embedding",
        "dense-biases",
    ],
)
def test_logits_agree_across_layouts(ranks: RankPool, shape: ModelShape, layouts: list[Layout]) -> None:
    answers = ranks.run(logits_of, shape, layouts)
    reference = next(answer[0] for answer in answers if answer[0] is not None)
    assert reference.shape == (2, 12, 250)
    assert float(reference.std()) > 1e-2
    for number, where in enumerate(layouts):
        held = [answer[number] for answer in answers if answer[number] is not None]
        assert len(held) == where.world_size // where.pp
        for logits in held:
            torch.testing.assert_close(logits, reference, atol=2e-5, rtol=1e-4)


class Predicted(Exception):
    """Ends a forward pass behind the multi-token prediction layers."""


def predicted_of(rank: int, shape: ModelShape, layouts: list[Layout]) -> list[torch.Tensor | None]:
    """Hidden states `[(1 + layers) * sequence, batch, hidden]` behind the multi-token prediction layers."""

    def predicted(model: BuiltModel) -> torch.Tensor | None:
        fill(read_weights(model))
        found: list[torch.Tensor] = []

        def keep(chunk: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
            """Stop behind the layers, or pass the hidden states of the next token on to the last chunk."""
            found.append(output)
            if chunk.post_process:
                raise Predicted
            return output.chunk(1 + shape.mtp_num_layers)[0]

        for chunk in model.chunks:
            if hasattr(chunk, "mtp"):
                chunk.mtp.register_forward_hook(lambda *given, chunk=chunk: keep(chunk, given[-1]))
        without = compat.without_token_prediction
        predicting = patch.object(
            compat,
            "without_token_prediction",
            lambda chunk: contextlib.nullcontext() if hasattr(chunk, "mtp") else without(chunk),
        )
        with predicting, contextlib.suppress(Predicted):
            forward_logits(model, TOKENS)
        return found[0] if found else None

    models = [built(shape, where) for where in layouts]
    return [None if model is None else predicted(model) for model in models]


@pytest.mark.parametrize("shape", [LATENT, SEQUENTIAL], ids=["latent", "sequential"])
def test_token_prediction_agrees_across_layouts(ranks: RankPool, shape: ModelShape) -> None:
    """The logits of the next token do not depend on these layers, so their own output is compared here."""
    layouts = [layout(), layout(tp=2, ep=2, etp=2), layout(tp=2, ep=2, pp=2, vpp=2)]
    layouts += [written("E|ttt|t|mm|L"), written("Et|t|ttmm|L", vpp=2), written("Ettttmm|L", ep=2)]
    answers = ranks.run(predicted_of, replace(shape, mtp_num_layers=2), layouts)
    held = [answer[number] for number in range(len(layouts)) for answer in answers if answer[number] is not None]
    assert len(held) == 1 + 4 + 4 + 1 + 1 + 2
    assert held[0].shape == (3 * 12, 2, 64)
    main, *further = held[0].chunk(3)
    assert all(float((one - main).abs().max()) > 1e-2 for one in further)
    for found in held:
        torch.testing.assert_close(found, held[0], atol=2e-5, rtol=1e-4)


def test_both_spellings_of_experts_agree(ranks: RankPool) -> None:
    grouped = ranks.run(logits_of, MOE, [layout(ep=2)])[0][0]
    sequential = ranks.run(logits_of, SEQUENTIAL, [layout(ep=2)])[0][0]
    torch.testing.assert_close(grouped, sequential)


def test_one_changed_weight_changes_logits(ranks: RankPool) -> None:
    """The comparison fails if one expert's gate and up are exchanged."""
    right, changed = ranks.run(logits_with_swapped_gate)[0]
    assert float((right - changed).abs().max()) > 1e-4


def logits_with_swapped_gate(rank: int) -> list[torch.Tensor | None]:
    model = built(MOE, layout())
    if model is None:
        return []
    memory = read_weights(model)
    fill(memory)
    right = forward_logits(model, TOKENS)
    weight = model.module.decoder.layers[1].mlp.experts.linear_fc1.weight0
    with torch.no_grad():
        weight.copy_(weight.roll(weight.size(0) // 2, dims=0))
    return [right, forward_logits(model, TOKENS)]


def test_failure_inside_is_a_refit_error() -> None:
    with playing(0, 1):
        model = built(MOE, layout())
        assert model is not None
        with pytest.raises(RefitError, match="the forward pass failed"):
            forward_logits(model, TOKENS.float())
