"""What a running engine generates, beside the pass of a reference with the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refit.config.shape import Dtype
from refit.models.vllm.engine.serving import Generated
from refit.results.serving import ServedCheck

if TYPE_CHECKING:
    from refit.models.huggingface.whole import WholePass

TOLERANCE = {Dtype.FP32: 1e-3, Dtype.FP16: 5e-2, Dtype.BF16: 0.25}
"""Nats between a log-probability of the engine, which computes in this dtype, and the reference in float32."""

NEAR_TIE = {Dtype.FP32: 1e-5, Dtype.FP16: 5e-3, Dtype.BF16: 2e-2}
"""Share of the largest score of a router. Where a token's experts lie closer to others, rounding in this dtype may send
it elsewhere, so that nothing can be said of what follows it."""

ROUNDINGS, MOST_NATS = 3.0, 1.0
"""The tolerance is at least ROUNDINGS times what rounding to the engine's dtype changes in the reference itself: models
differ in how much of it reaches their output, and engines in where they round. Beyond MOST_NATS nothing could be told
from a weight that is wrong."""

MIN_COMPARED = 0.5
"""Share of the tokens that must be left for a verdict."""


@dataclass(slots=True)
class _Tally:
    """Tokens compared, and those that are wrong."""

    tolerance: float
    near_tie: float
    num_tokens: int = 0
    num_excluded: int = 0
    num_wrong: int = 0
    difference: float = 0.0
    first: str | None = None

    def add(self, where: str, found: float, token: int, after: WholePass, place: int, is_greedy: bool = False) -> None:
        """`found` is the engine's log-probability of `token` after the one at `place`."""
        if after.gap[place] < self.near_tie:
            self.num_excluded += 1
            return
        expected = float(after.logprobs[place, token])
        likeliest = float(after.logprobs[place].max()) if is_greedy else expected
        difference = abs(found - expected)
        if math.isnan(difference):
            difference = math.inf
        self.difference = max(self.difference, difference)
        unlikely = not likeliest - expected <= 2 * self.tolerance
        self.num_tokens += 1
        if difference > self.tolerance or unlikely:
            self.num_wrong += 1
            what = f"{found:.4g} for {expected:.4g}" if difference > self.tolerance else "another is likelier"
            self.first = self.first or f"{where}: {what}"

    def verdict(self, num_sets: int, reference: str) -> ServedCheck:
        num_all, skipped = self.num_tokens + self.num_excluded, None
        if self.tolerance > MOST_NATS:
            rounding = self.tolerance / ROUNDINGS
            skipped = (
                f"rounding alone changes this model's log-probabilities by {rounding:.2g} nats; {ROUNDINGS:g} times "
                f"that is more than {MOST_NATS:g}: check it in float32 or float16 (--fp32, --fp16)"
            )
            return ServedCheck(passed=True, skipped=skipped, reference=reference, num_sets=num_sets)
        if self.num_tokens < MIN_COMPARED * num_all and not self.num_wrong:
            skipped = (
                f"near ties of experts leave {self.num_tokens} of {num_all} tokens to compare, at least "
                f"{MIN_COMPARED * num_all:.0f} are needed: check it in float32 (--fp32)"
            )
        return ServedCheck(
            passed=not self.num_wrong,
            skipped=skipped,
            reference=reference,
            num_sets=num_sets,
            num_tokens=self.num_tokens,
            num_excluded=self.num_excluded,
            num_wrong=self.num_wrong,
            difference=self.difference if math.isfinite(self.difference) else None,
            tolerance=self.tolerance,
            first_wrong=self.first,
        )


def rounding_of(tokens: Sequence[int], exact: WholePass, rounded: WholePass, near_tie: float) -> float:
    """By how many nats the passes of a reference differ in what follows each token, without those near a tie."""
    places = torch.arange(len(tokens) - 1)[exact.gap[: len(tokens) - 1] >= near_tie]
    following = torch.tensor(tokens[1:])[places]
    found = (rounded.logprobs[places, following] - exact.logprobs[places, following]).abs()
    return float(found.max()) if len(found) else 0.0


def compared(
    prompt: Sequence[int],
    found: Sequence[tuple[Generated, WholePass]],
    tolerance: float,
    near_tie: float,
    reference: str,
) -> ServedCheck:
    """The verdict on what was generated with every set of weights, beside the reference's pass over the prompt and the
    generated tokens."""
    tally = _Tally(tolerance, near_tie)
    for number, (generated, after) in enumerate(found, 1):
        for place, value in enumerate(generated.prompt_logprobs):
            tally.add(f"prompt token {place + 2}, weights {number}", value, prompt[place + 1], after, place)
        for place, (token, value) in enumerate(zip(generated.tokens, generated.logprobs, strict=True)):
            where = f"generated token {place + 1}, weights {number}"
            tally.add(where, value, token, after, len(prompt) - 1 + place, is_greedy=True)
    return tally.verdict(len(found), reference)
