"""FP8 engines on ranks: refits arrive in vLLM's own codes and scales, and they are those of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from refit.bench import oracle
from refit.bench.engines.refit import PlannedEngine
from refit.bench.sides import Side, refitted_to
from refit.config.quantisation import Quantisation
from refit.config.scenario import Scenario
from refit.encodings.fp8.oracle import Fp8Part
from refit.encodings.fp8.reference import quantise
from refit.models.fsdp2.side import Fsdp2Side
from refit.models.vllm.side import VllmSide
from refit.predict.sides import plan_sides
from refit.results.refit import RefitResult
from refit.transport.ranks import Ranks
from tests.models.vllm.test_side import (
    CPU,
    FSDP2,
    MEGATRON,
    built,
    engine,
    maps,  # noqa: F401 -- a fixture
    misfused,
    run_scenario,
    seeded,
)
from tests.ranks.pool import RankPool

pytestmark = [pytest.mark.slow, pytest.mark.one_megatron]

RUN = ["--refit-method=gloo", "--num-benchmark-warmup=1", "--num-benchmark-iterations=1", "--vocab-size=500"]
RUN += ["--rl-inference-format=vllm"]
BLOCK, MX = "--rl-inference-dtype=fp8-block", "--rl-inference-dtype=mxfp8"
DEEPSEEK = ["--model=tiny_deepseek_v3", "--num-layers=3", "--moe-layer-freq=([0]*1+[1]*2)", "--q-lora-rank=128"]
DEEPSEEK += ["--qk-pos-emb-head-dim=32", "--moe-ffn-hidden-size=256", "--moe-shared-expert-intermediate-size=256"]
"""96 rows of `kv_a_proj_with_mqa`, behind the 128 of `q_a_proj`: its block is a smaller one. So is that of 64 columns
of `kv_b_proj`."""
SHARED_MEMORY = ["--refit-mode=collocated", "--refit-method=shm"]
QWEN = ["--model=tiny_qwen3", "--num-layers=2", "--kv-channels=128"]
QWEN_MOE = ["--model=tiny_qwen3_moe", "--kv-channels=128", "--moe-ffn-hidden-size=256"]
HALF_HEADS = ["--kv-channels=64", "--num-query-groups=4"]
"""Blocks of `q_proj`, `k_proj` and `v_proj` have two heads each, which `linear_qkv` has apart."""


def check(result: RefitResult, *, forward: bool = True) -> tuple[int, int]:
    """Blocks quantised at the source and at the destination."""
    tested, quantised = result.engines["refit"], result.quantised
    assert (tested.status, tested.num_wrong) == ("ok", 0)
    assert tested.num_compared > 0
    assert quantised is not None
    if forward:
        assert tested.forward is not None
        assert (tested.forward.passed, tested.forward.skipped, tested.forward.tolerance) == (True, None, 1e-4)
    return quantised.blocks_at_source, quantised.blocks_at_destination


@pytest.mark.parametrize(
    "flags",
    [
        [BLOCK, *DEEPSEEK, *MEGATRON, *engine(2, 2, ep=True)],
        [BLOCK, *DEEPSEEK, *FSDP2, *engine(1, 4, ep=True), "--rl-inference-num-redundant-experts=4"],
        [BLOCK, *DEEPSEEK, *MEGATRON, *engine(1, 2, 2, ep=True, replicas=2), *SHARED_MEMORY],
        [BLOCK, *QWEN_MOE, *MEGATRON, *engine(2), "--fp8-scale-rule=pow2", "--quantise=destination"],
        [BLOCK, *QWEN_MOE, *HALF_HEADS[:1], "--num-query-groups=2", *MEGATRON, *engine(1, 4, ep=True)],
        [BLOCK, *QWEN, *HALF_HEADS, *FSDP2, *engine(1, replicas=2), *SHARED_MEMORY],
        [MX, *QWEN_MOE, *MEGATRON, *engine(2, 2, ep=True), "--quantise=source"],
        [MX, *QWEN, *FSDP2, *engine(2, replicas=2), "--verify=sample"],
    ],
    ids=[
        "sequence-parallel-moe",
        "redundant",
        "collocated-pipeline",
        "sliced-experts",
        "half-heads",
        "half-heads-collocated",
        "mxfp8",
        "mxfp8-engines",
    ],
)
def test_refits_arrive_and_logits_agree(ranks: RankPool, flags: list[str]) -> None:
    (answer, *_) = ranks.run(run_scenario, [*RUN, "--check-forward", *flags])
    at_source, at_destination = check(answer.measurements["refit"])
    assert (at_source > 0) == ("--quantise=destination" not in flags)
    assert (at_destination > 0) == (BLOCK in flags), "row shards cut blocks of 128 rows, not those of one"


def test_experts_move_between_two_refits(ranks: RankPool, maps: dict[str, str]) -> None:  # noqa: F811
    placed = [f"--rl-inference-expert-placement={maps['first']}"]
    placed += [f"--rl-inference-expert-placement-next={maps['second']}"]
    argv = [*RUN, BLOCK, *DEEPSEEK, *MEGATRON, *engine(2, 2, ep=True), *placed, "--check-forward"]
    (answer, *_) = ranks.run(run_scenario, argv)
    result: RefitResult = answer.measurements["refit"]
    assert result.rearranged is not None
    check(result)
    check(result.rearranged)


def test_a_wrong_fusion_fails_the_forward_check(ranks: RankPool) -> None:
    """Codes and scales are where the sharding says, so comparing bits cannot find it."""
    name, members = "mlp.gate_up_proj.weight", ("mlp.up_proj.weight", "mlp.gate_proj.weight")
    argv = [*RUN, BLOCK, "--check-forward", *QWEN, *MEGATRON[:1], "--source-world-size=2", *engine(2)]
    (answer, *_) = ranks.run(misfused, argv, name, members)
    tested = answer.measurements["refit"].engines["refit"]
    assert tested.num_wrong == 0
    assert not tested.forward.passed


# --- The tensors of the checkpoint, without the suite's oracle and predictions ---------------------------------------


def quantising_refit(scenario: Scenario, source: Side, destination: Side) -> None:
    source = refitted_to(destination.spec, scenario.model, source)
    planned = plan_sides(source.sharding, destination.sharding, destination.spec, None)
    moving = PlannedEngine(scenario, CPU)
    moving.connect(planned, Ranks.of_default_group())
    program = moving.prepare(planned, source, destination)
    program.run()
    program.close()


def refit_of_a_state_dict(rank: int, argv: list[str]) -> dict[str, Any]:
    """Fill the source from a seeded full state dict, refit. Returns it, and the engine's tensors on this rank."""
    scenario, source, destination = built(argv)
    full = {name: tensor.bfloat16() for name, tensor in seeded(scenario).items()}
    if rank in scenario.source.ranks:
        assert isinstance(source.model, Fsdp2Side)
        set_model_state_dict(source.model.module, dict(full), options=StateDictOptions(full_state_dict=True))
    quantising_refit(scenario, source, destination)
    assert isinstance(destination.model, VllmSide)
    held = destination.model.model.parameters if destination.model.model is not None else {}
    return {"seeded": full, "held": dict(held)}


Pair = tuple[torch.Tensor, torch.Tensor]
"""Codes and scales."""


def published(full: dict[str, torch.Tensor], name: str, rule: Quantisation) -> Pair:
    """A tensor of a checkpoint, quantised by itself."""
    done = quantise(full[name], rule)
    return done.codes, done.scales


def rows(pair: Pair, tp: int, rank: int) -> Pair:
    return pair[0].chunk(tp)[rank], pair[1].chunk(tp)[rank]


def columns(pair: Pair, tp: int, rank: int) -> Pair:
    return pair[0].chunk(tp, dim=1)[rank], pair[1].chunk(tp, dim=1)[rank]


def fused(*pairs: Pair) -> Pair:
    codes, scales = zip(*pairs, strict=True)
    return torch.cat([part.view(torch.uint8) for part in codes]), torch.cat(scales)


def assert_held(held: dict[str, torch.Tensor], name: str, expected: Pair, suffix: str = "_scale_inv") -> None:
    for found, wanted in zip((held[name], held[name + suffix]), expected, strict=True):
        assert found.shape == wanted.shape, name
        assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("heads", [[], HALF_HEADS], ids=["", "half-heads"])
@pytest.mark.parametrize(
    ("dtype", "suffix"), [(Quantisation("fp8-block", "amax"), "_scale_inv"), (Quantisation("mxfp8", "ceil"), "_scale")]
)
def test_fused_tensors_hold_the_codes_and_scales_of_the_checkpoints_tensors(
    ranks: RankPool, dtype: Quantisation, suffix: str, heads: list[str]
) -> None:
    """A Qwen3-MoE on TP 2 with slices of every expert: [q; k; v], w13 [gate; up], columns of `o_proj` and w2."""
    flags = [f"--rl-inference-dtype={dtype.dtype}", *QWEN_MOE, *heads, *FSDP2, *engine(2)]
    answers = ranks.run(refit_of_a_state_dict, [*RUN, *flags])
    full = answers[0]["seeded"]
    for rank, answer in enumerate(answers[3:5]):
        held = answer["held"]
        for layer in (0, 1):
            attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
            parts = [rows(published(full, f"{attention}{name}_proj.weight", dtype), 2, rank) for name in "qkv"]
            assert_held(held, f"{attention}qkv_proj.weight", fused(*parts), suffix)
            whole = published(full, f"{attention}o_proj.weight", dtype)
            assert_held(held, f"{attention}o_proj.weight", columns(whole, 2, rank), suffix)
            for expert in range(8):
                halves = [
                    done
                    for half in full[f"{mlp}experts.gate_up_proj"][expert].chunk(2)
                    for done in [quantise(half.contiguous(), dtype)]
                ]
                gate_up = fused(*(rows((half.codes, half.scales), 2, rank) for half in halves))
                down = quantise(full[f"{mlp}experts.down_proj"][expert], dtype)
                one = {name: tensor[expert] for name, tensor in held.items() if name.startswith(f"{mlp}experts.")}
                assert_held(one, f"{mlp}experts.routed_experts.w13_weight", gate_up, suffix)
                assert_held(
                    one, f"{mlp}experts.routed_experts.w2_weight", columns((down.codes, down.scales), 2, rank), suffix
                )
            assert held[f"{mlp}gate.weight"].dtype == torch.bfloat16


def test_a_smaller_last_block_is_that_of_the_checkpoint(ranks: RankPool) -> None:
    """[q_a_proj; kv_a_proj_with_mqa] has 128 + 96 rows, `kv_b_proj` 64 columns."""
    dtype = Quantisation("fp8-block", "amax")
    answers = ranks.run(refit_of_a_state_dict, [*RUN, BLOCK, *DEEPSEEK, *FSDP2, *engine(1, 2, ep=True)])
    full, held = answers[0]["seeded"], answers[3]["held"]
    prefix = "model.layers.1.self_attn."
    parts = [published(full, f"{prefix}{name}.weight", dtype) for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    assert [tuple(scales.shape) for _, scales in parts] == [(1, 2), (1, 2)]
    assert_held(held, f"{prefix}fused_qkv_a_proj.weight", fused(*parts))
    assert_held(held, f"{prefix}kv_b_proj.weight", published(full, f"{prefix}kv_b_proj.weight", dtype))


# --- What the oracle finds in vLLM's tensors --------------------------------------------------------------------------


def swapped_halves(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """The scales of gate and up, the wrong way round."""
    scales.copy_(scales.clone().roll(scales.shape[-2] // 2, -2))


def swapped_parts(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """The scales of the last two blocks of rows, the wrong way round: of `k_proj` and `v_proj`."""
    scales[-2:] = scales[-2:].flip(0).clone()


def neighbours(codes: torch.Tensor, scales: torch.Tensor) -> None:
    scales.copy_(scales.clone().roll(1, -1))


def another_slot(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """The scales of the expert in the slot before."""
    scales.copy_(scales.clone().roll(1, 0))


def twice_as_large(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """As a rule would leave them that keeps a bit in reserve."""
    scales.mul_(2)


FAULTS = [swapped_halves, neighbours, another_slot, twice_as_large]


def wrong_keys(rank: int, argv: list[str], name: str, fault: Callable[..., None] | None) -> set[str]:
    """What the oracle finds wrong on this rank after a refit and a fault in the parameter `name` and its scales."""
    scenario, source, destination = built(argv)
    source = refitted_to(destination.spec, scenario.model, source)
    quantisation = destination.spec.quantisation
    if source.weights is not None:
        oracle.fill(source.weights, 3, Fp8Part(quantisation))
    if destination.weights is not None:
        oracle.poison(destination.weights)
    quantising_refit(scenario, source, destination)
    if destination.weights is None:
        return set()
    assert isinstance(destination.model, VllmSide)
    assert destination.model.model is not None
    held = destination.model.model.parameters
    if fault is not None:
        fault(held[name], held[f"{name}_scale_inv"])
    tensors = source.sharding.tensors
    return {each.key for each in oracle.check(destination.weights, tensors, 3, part=Fp8Part(quantisation)).wrong}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_fused_experts_are_found(ranks: RankPool, fault: Callable[..., None] | None) -> None:
    argv = [*RUN, BLOCK, *QWEN_MOE, *MEGATRON, *engine(2, 2, ep=True)]
    name, key = (
        "model.layers.1.mlp.experts.routed_experts.w13_weight",
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
    )
    found = ranks.run(wrong_keys, argv, name, fault)
    assert found[4:] == [set() if fault is None else {f"{key}_scale_inv"}] * 4


@pytest.mark.parametrize("fault", [None, swapped_parts, neighbours, twice_as_large])
def test_faults_in_fused_heads_are_found(ranks: RankPool, fault: Callable[..., None] | None) -> None:
    """Heads of half a block, on an engine of TP 2: 256 rows of `q_proj`, 128 of `k_proj`, 128 of `v_proj`."""
    argv = [*RUN, BLOCK, *QWEN, *HALF_HEADS, *MEGATRON[:1], "--source-world-size=2", *engine(2)]
    found = ranks.run(wrong_keys, argv, "model.layers.1.self_attn.qkv_proj.weight", fault)
    parts = {None: (), swapped_parts: ("key", "value")}.get(fault, ("query", "key", "value"))
    wanted = {f"decoder.layers.1.self_attention.{part}.linear_qkv.weight_scale_inv" for part in parts}
    assert found[2:4] == [wanted] * 2


def test_another_rule_than_the_named_one_is_found(ranks: RankPool) -> None:
    argv = [*RUN, BLOCK, *QWEN_MOE, *MEGATRON, *engine(2, 2, ep=True)]
    found = ranks.run(refit_by_another_rule, argv)
    assert all({key for key in keys if key.endswith("linear_fc2.weight_scale_inv")} for keys in found[4:])


def refit_by_another_rule(rank: int, argv: list[str]) -> set[str]:
    """As `wrong_keys`, of a refit whose program quantises by `pow2` where `amax` is named."""
    scenario, source, destination = built([*argv, "--fp8-scale-rule=pow2"])
    named = Quantisation("fp8-block", "amax")
    if source.weights is not None:
        oracle.fill(source.weights, 3, Fp8Part(named))
    quantising_refit(scenario, source, destination)
    if destination.weights is None:
        return set()
    tensors = source.sharding.tensors
    return {each.key for each in oracle.check(destination.weights, tensors, 3, part=Fp8Part(named)).wrong}
