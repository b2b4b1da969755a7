"""`--check-forward`: compare the logits of both models on the same tokens, after the weights were compared as bits.

The bit comparison checks the weights. The logits check that both layouts use the weights as the same model. Another
layout sums in another order, and a router may then choose another expert where two nearly tie. So logits must agree
within a tolerance, and only for a share of the tokens.
"""

from __future__ import annotations

import torch

from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.errors import RefitError, UnavailableError
from refit.results.refit import ForwardCheck

NUM_TOKENS = 16
TOLERANCE = {Dtype.FP32: 1e-4, Dtype.FP16: 2e-2, Dtype.BF16: 5e-2}
"""Largest difference of a token's logits that counts as equal, relative to the largest logit."""
FP8_TOLERANCE = 0.25
"""The same where one side holds FP8 codes. A code has 4 significant bits: it is off by up to 1 part in 16."""
MIN_AGREEMENT = 0.75
"""Share of tokens whose logits must be equal within the tolerance."""
FP8_MIN_AGREEMENT = 0.5
"""The same where one side holds FP8 codes: their rounding changes the choice of experts more often. Two models that
have nothing in common agree at no token."""


def compare_forward(session: Session, source: Side, destination: Side) -> ForwardCheck:
    """Run both models on the same tokens and compare their logits. Collective: every rank of the job.

    The check is skipped, with the reason, where a rank cannot run its side forward.
    """
    shape, both = session.scenario.model, (source, destination)
    if shape is None:
        return _skipped("a model from --model-provider has no known vocabulary to draw tokens from")
    reasons = gather(session.control, next((reason for side in both if (reason := _obstacle(side))), None))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        return _skipped(reason)
    num_tokens = min(NUM_TOKENS, shape.max_position_embeddings)
    tokens = torch.randint(shape.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    expected, found = (_logits(session, side, tokens) for side in both)
    difference, scale = (expected - found).abs().amax(dim=-1), float(expected.abs().max())
    tolerance = max(_tolerance(side.spec) for side in both)
    agreement = float((difference <= tolerance * scale).float().mean())
    return ForwardCheck(
        passed=agreement >= min(_least_agreement(side.spec) for side in both),
        agreement=agreement,
        max_difference=float(difference.max()),
        max_logit=scale,
        tolerance=tolerance,
    )


def _tolerance(side: SideSpec) -> float:
    assert side.compute_dtype is not None
    return FP8_TOLERANCE if side.quantisation is not None else TOLERANCE[side.compute_dtype]


def _least_agreement(side: SideSpec) -> float:
    return FP8_MIN_AGREEMENT if side.quantisation is not None else MIN_AGREEMENT


def _skipped(reason: str) -> ForwardCheck:
    return ForwardCheck(passed=True, skipped=reason)


def _obstacle(side: Side) -> str | None:
    """The reason why this rank cannot run its part of `side` forward; None if it can."""
    try:
        side.model.check_forward()
    except UnavailableError as error:
        return str(error)
    return None


def _logits(session: Session, side: Side, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the side, on every rank, from the first rank that has them. Collective: every rank of the job."""
    mine = side.model.forward(tokens)
    has_logits: list[bool] = gather(session.control, mine is not None)
    if True not in has_logits:
        raise RefitError(f"the forward pass of {side.spec.title} gave no rank any logits")
    first = has_logits.index(True)
    said = mine.cpu() if mine is not None and session.rank == first else None
    heard: list[torch.Tensor] = gather(session.control, said)
    return heard[first]
