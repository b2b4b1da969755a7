"""What a running engine generates, beside a reference: which difference is a fault."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from refit.bench.generated import compared, rounding_of
from refit.models.huggingface.whole import WholePass
from refit.models.vllm.engine.serving import Generated
from refit.results.serving import ServedCheck

PROMPT = [3, 1, 2]
VOCABULARY = 5


def after(*gaps: float) -> WholePass:
    """After each token of the prompt and the first generated one; their routers' `gaps`, infinity without."""
    values = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1))
    return WholePass(torch.log_softmax(values, -1), torch.tensor(gaps or [math.inf] * 4))


def generated(whole: WholePass, tokens: Sequence[int] | None = None, shift: float = 0.0) -> Generated:
    rows = whole.logprobs
    chosen = tokens or [int(rows[2].argmax()), int(rows[3].argmax())]
    prompt = [float(rows[place, PROMPT[place + 1]]) for place in range(2)]
    values = [float(rows[2 + place, token]) for place, token in enumerate(chosen)]
    return Generated(tuple(chosen), tuple(value + shift for value in values), tuple(prompt))


def check(*found: tuple[Generated, WholePass]) -> ServedCheck:
    return compared(PROMPT, found, 0.01, 0.02, "a reference")


def test_equal_ones_pass_for_each_set_of_weights() -> None:
    rows = after()
    verdict = check((generated(rows), rows), (generated(rows, shift=0.009), rows))
    assert (verdict.passed, verdict.fault) == (True, None)
    assert (verdict.num_sets, verdict.num_tokens, verdict.num_wrong) == (2, 8, 0)
    assert verdict.difference == pytest.approx(0.009, abs=1e-5)


def test_values_beyond_the_tolerance_are_wrong() -> None:
    rows = after()
    verdict = check((generated(rows), rows), (generated(rows, shift=0.02), rows))
    assert (verdict.passed, verdict.num_wrong) == (False, 2)
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.startswith("generated token 1, weights 2: ")
    assert "2 of 8 tokens" in str(verdict.fault)


def test_a_token_that_is_not_the_likeliest_is_wrong_though_its_value_is_right() -> None:
    rows = after()
    unlikely = [int(rows.logprobs[2].argmin()), int(rows.logprobs[3].argmax())]
    assert check((generated(rows, unlikely), rows)).first_wrong == "generated token 1, weights 1: another is likelier"


def test_nan_is_wrong_and_has_no_difference_to_write() -> None:
    rows = after()
    verdict = check((generated(rows, shift=math.nan), rows))
    assert (verdict.passed, verdict.num_wrong, verdict.difference) == (False, 2, None)


def test_what_follows_a_near_tie_of_experts_is_left_out() -> None:
    tie = after(1.0, 1.0, 0.01, 1.0)
    verdict = check((generated(tie, shift=0.009), tie))
    assert (verdict.passed, verdict.num_tokens, verdict.num_excluded) == (True, 3, 1)
    assert check((generated(tie, shift=0.02), tie)).num_wrong == 1
    many = after(1.0, 0.01, 0.01, 0.01)
    verdict = check((generated(many), many))
    assert (verdict.passed, verdict.skipped is not None) == (True, True)


def test_rounding_is_that_of_tokens_that_are_compared() -> None:
    exact = after(math.inf, 0.001, math.inf, math.inf)
    moved = exact.logprobs.clone()
    moved[0, 1] += 0.5
    moved[1, 2] += 5.0  # near a tie
    rounded = WholePass(moved, exact.gap)
    assert rounding_of([3, 1, 2, 0], exact, rounded, 0.02) == pytest.approx(0.5)
    assert rounding_of([3, 1, 2, 0], exact, exact, 0.02) == 0.0


def test_a_model_that_rounding_changes_by_too_much_is_not_judged() -> None:
    rows = after()
    verdict = compared(PROMPT, [(generated(rows, shift=9.0), rows)], 1.2, 0.02, "a reference")
    assert (verdict.passed, verdict.num_tokens) == (True, 0)
    assert "by 0.4 nats" in str(verdict.skipped)
