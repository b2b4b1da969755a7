"""The line on a check of the forward pass."""

from __future__ import annotations

from dataclasses import replace

from refit.report.refits.forward_line import forward_line
from refit.results.refit import ForwardCheck

PASSED = ForwardCheck(
    True,
    agreement=1.0,
    tolerance=1e-4,
    num_tokens=64,
    num_layers=8,
    num_excluded=0,
    layer_difference=7.95e-7,
    router_difference=2.9e-7,
    num_experts=64,
    num_reached=63,
)


def test_what_was_compared_and_how_far_it_is_apart() -> None:
    assert forward_line("refit", PASSED) == (
        "Forward check (refit) passed: 100 % of 64 tokens agree in 8 layers and in the logits, in float32; largest "
        "difference 8e-07 of what a layer adds and 2.9e-07 of routers' scores, tolerance 0.0001; 63 of 64 experts "
        "reached"
    )
    dense = replace(PASSED, num_experts=0, num_reached=0, router_difference=None)
    assert forward_line("refit", dense, "trained weights").startswith("Forward check (refit, trained weights) passed")
    assert forward_line("refit", dense).endswith("largest difference 8e-07 of what a layer adds, tolerance 0.0001")


def test_a_fault_is_named_with_its_place() -> None:
    failed = replace(PASSED, passed=False, agreement=0.25, first_wrong="the router of layer 5", layer_difference=None)
    line = forward_line("megatron", replace(failed, num_excluded=2))
    assert line.startswith("Forward check (Megatron-Core) FAILED: 25 % of 64 tokens agree in 8 layers")
    assert "; the first difference is at the router of layer 5; largest difference unknown of what" in line
    assert line.endswith("; 2 results left out for near ties of experts")


def test_no_verdict_says_why() -> None:
    line = forward_line("megatron", ForwardCheck(True, "no vocabulary"))
    assert line == "Forward check (Megatron-Core) waived: no vocabulary"
