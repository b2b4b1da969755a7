"""The check of the forward pass: right refits of deep models pass, wrong layouts are found, near ties do not decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch

from refit.bench import forward_check
from refit.bench.measurements import engine_run
from refit.errors import RefitError
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights, assembled
from refit.models.forward_pass import ForwardPass, Routing
from refit.plan.box import Box
from refit.results.refit import ForwardCheck
from refit.results.result import Result
from tests.bench.test_runner import run_scenario
from tests.ranks.pool import RankPool

RUN = ["--refit-method=gloo", "--num-benchmark-warmup=0", "--num-benchmark-iterations=1", "--check-forward"]
SMALL = ["--hidden-size=128", "--vocab-size=300", "--make-vocab-size-divisible-by=1"]
DEEP = ["--model=tiny_qwen3_moe", "--num-layers=8", *SMALL, "--moe-ffn-hidden-size=128"]
LATENT = ["--model=tiny_deepseek_v3", "--num-layers=8", "--moe-layer-freq=([0]*1+[1]*7)", "--mtp-num-layers=0"]
BLOCK = ["--rl-inference-dtype=fp8-block", "--kv-channels=128", "--hidden-size=256", "--moe-ffn-hidden-size=256"]
TP2 = "--tensor-model-parallel-size=2"
TO_ONE = "--rl-inference-tensor-model-parallel-size=1"
VLLM, FSDP2 = "--rl-inference-format=vllm", "--rl-inference-format=fsdp2"


# --- What agrees ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [*DEEP, TP2, "--expert-model-parallel-size=2", "--expert-tensor-parallel-size=1", TO_ONE],
        [*DEEP, "--num-layers=24", "--rl-inference-tensor-model-parallel-size=2"],
        [*DEEP, "--pipeline-model-parallel-size=2", VLLM, "--rl-inference-pipeline-model-parallel-size=1"],
        [*DEEP, TP2, FSDP2, "--destination-world-size=2"],
        [*LATENT, TP2, VLLM],
        [*DEEP, *BLOCK, "--tensor-model-parallel-size=4", TO_ONE],
        [*DEEP, *BLOCK, TP2, VLLM],
        [*DEEP, "--rl-inference-dtype=mxfp8", TP2, TO_ONE],
    ],
    ids=["tp-ep", "24-layers", "stages-to-vllm", "fsdp2", "latent", "cut-blocks", "fp8-vllm", "mxfp8"],
)
def test_deep_models_in_bf16_agree(ranks: RankPool, flags: list[str]) -> None:
    """Rounding to BF16 sends a third of these tokens to other experts in layouts that are right."""
    (answer, *_) = ranks.run(run_scenario, [*RUN, *flags])
    check = answer.measurements["refit"].engines["refit"].forward
    assert (answer.exit_code, check.passed, check.skipped, check.first_wrong) == (0, True, None, None)
    assert (check.agreement, check.num_tokens) == (1.0, 64)
    assert max(check.layer_difference, check.router_difference) < 1e-5
    assert check.num_reached > 0.5 * check.num_experts


def test_the_source_keeps_its_weights(ranks: RankPool) -> None:
    """Its values are quantised for the comparison only."""
    assert all(ranks.run(source_after_check, [*RUN, *DEEP, *BLOCK, "--tensor-model-parallel-size=4", TO_ONE]))


def source_after_check(rank: int, argv: list[str]) -> bool:
    kept = []

    def compare(session: Any, source: Any, destination: Any) -> ForwardCheck:
        before = [shard.view.clone() for shard in source.weights or ()]
        check = forward_check.compare_forward(session, source, destination)
        kept.extend(torch.equal(a, shard.view) for a, shard in zip(before, source.weights or (), strict=True))
        return check

    with mock.patch.object(engine_run, "compare_forward", compare):
        run_scenario(rank, argv)
    return all(kept)


# --- What is found ----------------------------------------------------------------------------------------------------


def permuted(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Callable[[LocalWeights], None]:
    """Replaces the tensors of layer 5 with one of `names` in their keys, and their scales, by what `change` makes."""

    def apply(weights: LocalWeights) -> None:
        for key, shape in {shard.tensor.key: shard.tensor.shape for shard in weights}.items():
            if key.startswith("decoder.layers.5.") and any(name in key for name in names):
                whole = Box((0,) * len(shape), shape)
                held = assembled(weights, key, whole)
                bits = held.view(torch.uint8) if held.element_size() == 1 else held
                changed = change(bits).clone().view(held.dtype)
                for view in weights.views(key, whole):
                    view.data.copy_(part_within(changed, whole, view.box))

    return apply


FAULTS = {
    "experts swapped": permuted(lambda held: held[[1, 0, *range(2, len(held))]], "mlp.experts"),
    "gate and up swapped": permuted(lambda held: held.roll(held.size(-2) // 2, -2), "linear_fc1"),
    "queries, keys and values in another order": permuted(lambda held: held.roll(held.size(0) // 4, 0), "linear_qkv"),
    "other values": permuted(lambda held: held.flip(-1), "linear_proj"),
    "norm not written": permuted(lambda held: torch.full_like(held, torch.nan), "input_layernorm"),
}
ROUTED = {"rows of the router in another order": permuted(lambda held: held.flip(0), "router.weight")}


def checks_of_faults(rank: int, argv: list[str]) -> tuple[dict[str, ForwardCheck], Result]:
    """The check's verdict on every fault, planted in the destination after a right refit, and the run's own result."""
    found: dict[str, ForwardCheck] = {}

    def compare(session: Any, source: Any, destination: Any) -> ForwardCheck:
        held = destination.weights or LocalWeights(())
        right = [shard.view.clone() for shard in held]
        for name, plant in (FAULTS | ROUTED).items():
            plant(held)
            found[name] = forward_check.compare_forward(session, source, destination)
            for shard, before in zip(held, right, strict=True):
                shard.view.copy_(before)
        return forward_check.compare_forward(session, source, destination)

    with mock.patch.object(engine_run, "compare_forward", compare):
        return found, run_scenario(rank, argv)


@pytest.mark.one_megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "num_without"),
    [
        ([*DEEP, TP2, TO_ONE], 0),
        ([*DEEP, TP2, VLLM, TO_ONE], 0),
        ([*DEEP, TP2, FSDP2, TO_ONE], 0),
        ([*DEEP, *BLOCK, TP2, TO_ONE], 0),
        ([*DEEP, *BLOCK, TP2, VLLM, TO_ONE], 0),
        pytest.param(
            ["--model=tiny_qwen3", "--num-layers=8", TP2, TO_ONE, "--rl-inference-format=autotp"],
            2,
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ),
    ],
    ids=["megatron", "vllm", "fsdp2", "fp8", "fp8-vllm", "autotp"],
)
def test_faults_in_a_deep_model_are_found_where_they_are(ranks: RankPool, flags: list[str], num_without: int) -> None:
    """`num_without` faults are of experts, which the model does not have."""
    (found, result), *_ = ranks.run(checks_of_faults, [*RUN, *flags])
    assert result.exit_code == 0, "without a fault, the refit is right"
    missed = [name for name, check in found.items() if check.passed]
    assert len(missed) == num_without, missed
    for name, check in found.items():
        if name not in missed:
            assert check.first_wrong in ("layer 5", "the router of layer 5"), name
            assert check.agreement < 1


def wrong_run(rank: int, argv: list[str]) -> Result:
    def compare(session: Any, source: Any, destination: Any) -> ForwardCheck:
        FAULTS["experts swapped"](destination.weights or LocalWeights(()))
        return forward_check.compare_forward(session, source, destination)

    with mock.patch.object(engine_run, "compare_forward", compare):
        result: Result = run_scenario(rank, argv)
    return result


def test_a_fault_decides_the_run(ranks: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    (result, *_) = ranks.run(wrong_run, [*RUN, *DEEP, TP2, TO_ONE])
    refit = result.refit
    assert refit is not None
    assert refit.tested is not None
    assert (result.exit_code, result.status, refit.status, refit.tested.status) == (1, *["wrong_data"] * 3)
    assert refit.tested.num_wrong == 0


# --- Near ties --------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-3


def passes(scores: list[float], chosen: list[int]) -> ForwardPass:
    """A pass of 4 tokens through one layer with 3 experts. The last token has other `scores`, and chose `chosen`."""
    rows = torch.tensor([[[9.0, 5.0, 1.0]] * 3 + [scores]])
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[..., 0] = True
    mask[0, 3] = torch.tensor([expert in chosen for expert in range(3)])
    states = {0: torch.ones(1, 4, 2), 1: torch.ones(1, 4, 2) * 3}
    return ForwardPass(torch.ones(1, 4, 5), states, {0: Routing(rows, mask)})


def with_output(found: ForwardPass, token: int, value: float) -> ForwardPass:
    state = found.states[1].clone()
    state[0, token] = value
    return replace(found, states={**found.states, 1: state})


EXPECTED = passes([5.000, 5.001, 1.0], [1])


def test_equal_passes_agree() -> None:
    check = forward_check.compared(EXPECTED, EXPECTED, TOLERANCE)
    assert (check.passed, check.agreement, check.num_excluded) == (True, 1.0, 0)
    assert (check.num_layers, check.num_experts, check.num_reached) == (1, 3, 2)


def test_a_near_tie_is_left_out_in_its_layer_and_for_its_token_only() -> None:
    flipped = passes([5.001, 5.000, 1.0], [0])
    check = forward_check.compared(EXPECTED, with_output(flipped, 3, 100.0), TOLERANCE)
    assert (check.passed, check.agreement, check.num_excluded) == (True, 1.0, 1)
    check = forward_check.compared(EXPECTED, with_output(flipped, 2, 100.0), TOLERANCE)
    assert (check.passed, check.agreement, check.first_wrong) == (False, 0.75, "layer 0")


def test_another_choice_without_a_tie_is_wrong() -> None:
    """The scores agree, the expert of the lowest was chosen."""
    check = forward_check.compared(EXPECTED, passes([5.000, 5.001, 1.0], [2]), TOLERANCE)
    assert (check.passed, check.first_wrong) == (False, "the router of layer 0")


def test_other_scores_are_wrong_whatever_was_chosen() -> None:
    check = forward_check.compared(EXPECTED, passes([4.9, 5.001, 1.0], [1]), TOLERANCE)
    assert (check.passed, check.first_wrong) == (False, "the router of layer 0")


@pytest.mark.parametrize("value", [3.1, float("nan"), float("inf")])
def test_another_output_is_wrong(value: float) -> None:
    check = forward_check.compared(EXPECTED, with_output(EXPECTED, 1, value), TOLERANCE)
    assert (check.passed, check.first_wrong, check.agreement) == (False, "layer 0", 0.75)


def test_logits_are_compared_too() -> None:
    assert EXPECTED.logits is not None
    other = replace(EXPECTED, logits=EXPECTED.logits * 1.1)
    check = forward_check.compared(EXPECTED, other, TOLERANCE)
    assert (check.passed, check.first_wrong, check.agreement) == (False, "the logits", 0.0)


def test_too_many_near_ties_give_no_verdict() -> None:
    tied = torch.tensor([[[5.0, 5.0, 1.0]] * 4])
    first, second = (torch.tensor([[[*chosen]] * 4]) for chosen in ((True, False, False), (False, True, False)))
    ours, theirs = (replace(EXPECTED, routing={0: Routing(tied, chosen)}) for chosen in (first, second))
    check = forward_check.compared(ours, theirs, TOLERANCE)
    assert check.fault is None
    assert check.skipped == (
        "near ties of the experts of layer 0 leave 0 of 4 tokens to compare, at least 2 are needed: check weights "
        "whose experts differ"
    )
    logits = torch.zeros(1, 4, 5)
    assert forward_check.compared(ours, replace(theirs, logits=logits), TOLERANCE).fault is not None


def test_passes_of_other_layers_are_no_comparison() -> None:
    with pytest.raises(RefitError, match=r"routing of other layers: \[0\] and \[\]"):
        forward_check.compared(EXPECTED, replace(EXPECTED, routing={}), TOLERANCE)
