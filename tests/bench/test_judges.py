"""Who judges what a running engine generates."""

from __future__ import annotations

from refit.bench.judges import Nobody, OtherWay
from refit.models.vllm.engine.serving import Generated

ONE = Generated((4, 5), (-1.0, -2.0), (-3.0,))
OTHER = Generated((4, 6), (-1.0, -2.5), (-3.0,))


def test_two_ways_to_the_same_weights_generate_the_same() -> None:
    known: dict[str, dict[int, Generated]] = {}
    first = OtherWay("refit", known)
    first.add(1, ONE)
    first.add(2, OTHER)
    assert "next refit engine" in str(first.verdict().skipped)
    second = OtherWay("vllm-ipc", known)
    second.add(1, ONE)
    second.add(2, OTHER)
    verdict = second.verdict()
    assert (verdict.passed, verdict.num_sets, verdict.num_tokens) == (True, 2, 6)
    assert (verdict.reference, verdict.difference) == ("the same engine after refit", 0.0)


def test_another_token_after_another_way_is_wrong() -> None:
    known = {"refit": {1: ONE, 2: ONE}}
    second = OtherWay("vllm-ipc", known)
    second.add(1, ONE)
    second.add(2, OTHER)
    verdict = second.verdict()
    assert (verdict.passed, verdict.num_wrong, verdict.first_wrong) == (False, 1, "weights 2")
    assert verdict.difference == 0.5
    assert "1 of 6 tokens" in str(verdict.fault)


def test_a_log_probability_that_is_not_finite_has_no_difference() -> None:
    second = OtherWay("vllm-ipc", {"refit": {1: ONE}})
    second.add(1, Generated((4, 5), (-1.0, float("nan")), (-3.0,)))
    verdict = second.verdict()
    assert (verdict.passed, verdict.num_wrong, verdict.difference) == (False, 1, None)


def test_without_a_reference_nothing_is_generated() -> None:
    assert Nobody("no transformers").skipped == "no transformers"
