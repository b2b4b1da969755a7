"""`--check-forward`: the logits of both models on the same tokens, after the weights were compared bit for bit.

Bits prove the weights; logits prove that both layouts mean the same by them. Sums run in another order in another
layout, and a router near a tie may then choose another expert for a token, so logits agree within a tolerance, at most
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.bench.sides import Side, Sides
from refit.config.shape import Dtype
from refit.errors import UnavailableError
from refit.models.megatron.forward import check_forward_possible, forward_logits

NUM_TOKENS = 16
TOLERANCE = {Dtype.FP32: 1e-4, Dtype.FP16: 2e-2, Dtype.BF16: 5e-2}
"""Largest difference of a token's logits that counts as equal, as a share of the largest logit."""
MIN_AGREEMENT = 0.75
"""Share of tokens whose logits must be equal within the tolerance."""


@dataclass(frozen=True, slots=True)
class ForwardCheck:
    """`agreement` is the share of tokens with equal logits; all None but `skipped` where no forward pass could run."""

    skipped: str | None = None
    agreement: float | None = None
    max_difference: float | None = None
    max_logit: float | None = None

    @property
    def passed(self) -> bool:
        return self.skipped is not None or (self.agreement is not None and self.agreement >= MIN_AGREEMENT)


def compare_forward(session: Session, sides: Sides) -> ForwardCheck:
    """Run both models on the same tokens and compare. Collective: every rank of the job."""
    shape, both = session.scenario.model, (sides.source, sides.destination)
    if shape is None:
        return ForwardCheck(skipped="a model from --model-provider has no known vocabulary to draw tokens from")
    reasons = gather(session.control, next((reason for side in both if (reason := _obstacle(side))), None))
    skipped = next((reason for reason in reasons if reason is not None), None)
    if skipped is not None:
        return ForwardCheck(skipped=skipped)
    num_tokens = min(NUM_TOKENS, shape.max_position_embeddings)
    tokens = torch.randint(shape.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    source, destination = (_logits(session, side, tokens) for side in both)
    difference, scale = (source - destination).abs().amax(dim=-1), float(source.abs().max())
    return ForwardCheck(
        agreement=float((difference <= TOLERANCE[shape.dtype] * scale).float().mean()),
        max_difference=float(difference.max()),
        max_logit=scale,
    )


def _obstacle(side: Side) -> str | None:
    """Why this rank cannot run its part of `side` forward, or None."""
    if side.model is None:
        return None
    try:
        check_forward_possible(side.model)
    except UnavailableError as error:
        return str(error)
    return None


def _logits(session: Session, side: Side, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the whole side on every rank: all ranks of its last stage have them, the first of those is heard."""
    mine = forward_logits(side.model, tokens) if side.model is not None else None
    layout = side.layout
    speaker = layout.first_rank + (layout.pp - 1) * (layout.world_size // layout.pp)
    heard: torch.Tensor = gather(session.control, mine.cpu() if mine is not None and session.rank == speaker else None)[
        speaker
    ]
    return heard
