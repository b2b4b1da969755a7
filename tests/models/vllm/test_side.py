"""vLLM's engines on ranks: refits arrive, logits agree, redundant copies are filled, experts move between refits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from refit.bench import oracle
from refit.bench.engines.refit import PlannedEngine
from refit.bench.runner import benchmark
from refit.bench.session import new_session
from refit.bench.sides import Side, build_side, rearranged
from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.scenario import Mode, Scenario
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.errors import UnavailableError
from refit.models.fsdp2.build import materialise, meta_model
from refit.models.fsdp2.side import Fsdp2Side
from refit.models.megatron.compat import check_latent_query_norm
from refit.models.vllm.side import VllmSide
from refit.plan.cost import cost_of
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.predict.families.names import named_model
from refit.predict.sides import PlannedSides
from refit.results.refit import RefitResult
from refit.transport.ranks import Ranks
from tests.models.huggingface.sides import alone
from tests.predict.test_vllm import engine_models, sides
from tests.ranks.pool import RankPool

CPU = torch.device("cpu")
MAPS = {
    "first": [[5, 3, 1, 0, 2, 4, 7, 6, 3, 1, 0, 5], [0, 1, 2, 3, 4, 5, 6, 7, 0, 4, 1, 2]],
    "second": [[7, 6, 5, 4, 3, 2, 1, 0, 7, 5, 4, 3], [2, 0, 1, 7, 3, 4, 5, 6, 7, 0, 1, 2]],
}
"""Two layers of 8 experts in 12 slots, on 4 ranks: other copies and another order in each."""

SMALL = ["--fp32", "--refit-method=gloo", "--hidden-size=64", "--ffn-hidden-size=96", "--vocab-size=150"]
SMALL += ["--num-benchmark-warmup=1", "--num-benchmark-iterations=1", "--rl-inference-format=vllm", "--num-layers=3"]
DEEPSEEK = ["--model=tiny_deepseek_v3", "--moe-layer-freq=([0]*1+[1]*2)"]
GLM = ["--model=tiny_glm4_moe"]
GPT_OSS = ["--model=tiny_gpt_oss", "--ffn-hidden-size=192"]
MINIMAX = ["--model=tiny_minimax_m2", "--ffn-hidden-size=192"]
QWEN_MOE = ["--model=tiny_qwen3_moe", "--num-layers=2"]
QWEN_NEXT = ["--model=tiny_qwen3_next", "--num-layers=2"]
MEGATRON = ["--tensor-model-parallel-size=2", "--expert-model-parallel-size=2", "--source-world-size=4"]
MEGATRON += ["--expert-tensor-parallel-size=1"]
FSDP2 = ["--source-format=fsdp2", "--source-world-size=3"]


def engine(tp: int, dp: int = 1, pp: int = 1, *, ep: bool = False, replicas: int = 1) -> list[str]:
    sizes = {"tensor-model-parallel": tp, "expert-model-parallel": tp * dp if ep else 1, "pipeline-model-parallel": pp}
    flags = [f"--rl-inference-{name}-size={size}" for name, size in sizes.items()]
    return [*flags, f"--rl-inference-data-parallel-size={dp}", f"--rl-inference-replicas={replicas}"]


@pytest.fixture
def maps(tmp_path: Path) -> dict[str, str]:
    for name, rows in MAPS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    return {name: str(tmp_path / f"{name}.json") for name in MAPS}


def run_scenario(rank: int, argv: list[str]) -> Any:
    scenario = parse(argv).scenario
    assert dist.group.WORLD is not None
    return benchmark(new_session(scenario, CPU, dist.group.WORLD))


def check(result: RefitResult) -> None:
    tested = result.engines["refit"]
    assert (tested.status, tested.num_wrong) == ("ok", 0)
    assert tested.num_compared > 0
    assert tested.forward is not None
    assert tested.forward.skipped is None
    assert tested.forward.agreement == 1.0


@pytest.mark.parametrize(
    "flags",
    [
        ["--model=tiny_qwen3", "--source-world-size=2", "--tensor-model-parallel-size=2", *engine(2, replicas=3)],
        ["--model=tiny_qwen3", *FSDP2, "--num-query-groups=2", *engine(4)],
        ["--model=tiny_llama", "--source-world-size=2", "--tensor-model-parallel-size=2", *engine(2, pp=2)],
        ["--model=tiny_qwen2", *FSDP2, "--num-query-groups=2", *engine(4)],
        ["--model=tiny_mixtral", "--ffn-hidden-size=192", *MEGATRON, *engine(2, 2, ep=True)],
        [*GLM, *MEGATRON, *engine(4)],
        [*MINIMAX, *MEGATRON, *engine(4)],
        [*GPT_OSS, *MEGATRON, *engine(2, 2, ep=True)],
        [*GPT_OSS, *FSDP2, "--num-query-groups=2", *engine(4, ep=True)],
        [*MINIMAX, "--num-query-groups=2", *FSDP2, *engine(4)],
        [*QWEN_NEXT, *MEGATRON, *engine(2, 2, ep=True)],
        [*QWEN_NEXT, *FSDP2, "--num-query-groups=2", *engine(4)],
        ["--model=tiny_glm4_moe_lite", *MEGATRON, *engine(2, 2, ep=True)],
        ["--model=tiny_deepseek_v2", *DEEPSEEK[1:], *MEGATRON, *engine(2, 2, ep=True)],
        [*QWEN_MOE, *MEGATRON, *engine(2, 2)],
        [*QWEN_MOE, *MEGATRON, *engine(2, 2, ep=True), "--rl-inference-expert-placement=round_robin"],
        [*QWEN_MOE, *FSDP2, *engine(1, 4, ep=True), "--rl-inference-num-redundant-experts=4"],
        [*DEEPSEEK, *MEGATRON, *engine(2, 2, ep=True)],
        [*DEEPSEEK, *FSDP2, *engine(2, 1, 2, ep=True)],
        [*DEEPSEEK, *MEGATRON, *engine(1, 2, 2, ep=True, replicas=2), "--refit-mode=collocated"],
        [*DEEPSEEK, *FSDP2, *engine(1, 3, ep=True)],
    ],
    ids=[
        "engines",
        "replicated-kv-heads",
        "llama",
        "replicated-biases",
        "mixtral",
        "glm4_moe",
        "minimax_m2",
        "gpt_oss",
        "replicated-biases-of-gpt_oss",
        "replicated-norms",
        "qwen3_next",
        "cut-delta-nets",
        "glm4_moe_lite",
        "deepseek_v2",
        "sliced-experts",
        "round-robin",
        "redundant",
        "sequence-parallel-moe",
        "pipeline",
        "collocated",
        "uneven-experts",
    ],
)
def test_refits_arrive_and_logits_agree(ranks: RankPool, flags: list[str]) -> None:
    """In float32, so that both sides' routers choose the same experts."""
    (answer, *_) = ranks.run(run_scenario, [*SMALL, "--check-forward", *flags])
    check(answer.measurements["refit"])


@pytest.mark.one_megatron
@pytest.mark.slow
@pytest.mark.parametrize("source", [MEGATRON, FSDP2], ids=["megatron", "fsdp2"])
@pytest.mark.parametrize("model", [QWEN_MOE, DEEPSEEK], ids=["qwen3_moe", "deepseek_v3"])
def test_experts_move_between_two_refits(
    ranks: RankPool, maps: dict[str, str], model: list[str], source: list[str]
) -> None:
    placed = [f"--rl-inference-expert-placement={maps['first']}"]
    placed += [f"--rl-inference-expert-placement-next={maps['second']}"]
    argv = [*SMALL, *model, *source, *engine(2, 2, ep=True), *placed, "--check-forward"]
    (answer, *_) = ranks.run(run_scenario, argv)
    result: RefitResult = answer.measurements["refit"]
    check(result)
    assert result.rearranged is not None
    check(result.rearranged)
    assert result.plan is not None
    assert result.rearranged.plan is not None
    assert result.plan.digest != result.rearranged.plan.digest


def random_refit(rank: int, scenario: Scenario) -> int:
    """The wrong elements on this rank after a refit; the prediction is checked when the sides are built."""
    assert dist.group.WORLD is not None
    session = new_session(scenario, CPU, dist.group.WORLD)
    source, destination = (build_side(session, name) for name in ("source", "destination"))
    if source.weights is not None:
        oracle.fill(source.weights, 1)
    if destination.weights is not None:
        oracle.poison(destination.weights)
    refit(scenario, source, destination, plan_refit(source.sharding, destination.sharding))
    if destination.weights is None:
        return 0
    return oracle.check(destination.weights, source.sharding.tensors, 1).num_wrong


def formats_of(shape: ModelShape) -> list[str]:
    """The formats that can hold a source of `shape`: Megatron-Core 0.19 has no query norm without a rank."""
    try:
        check_latent_query_norm(shape)
    except UnavailableError:
        return ["fsdp2"]
    return ["megatron", "fsdp2"]


@pytest.mark.one_megatron
@pytest.mark.slow
@given(st.data())
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_random_placements_of_random_models_arrive(ranks: RankPool, data: st.DataObject) -> None:
    shape = data.draw(engine_models())
    destination = data.draw(sides(shape).filter(lambda spec: spec.world_size <= 6))
    destination = replace(destination, layout=replace(destination.layout, first_rank=2))
    source = SideSpec(Layout(1, 1, 1, 1, 2), format=data.draw(st.sampled_from(formats_of(shape))))
    scenario = Scenario(shape, source, destination, Mode.NON_COLLOCATED, "gloo")
    assert ranks.run(random_refit, scenario) == [0] * 8


# --- Without the suite's oracle --------------------------------------------------------------------------------------


def refit_of_a_state_dict(rank: int, argv: list[str]) -> dict[str, Any]:
    """Fill the source from a seeded full state dict, refit. Returns it, and the engine's tensors on this rank."""
    scenario, source, destination = built(argv)
    full = seeded(scenario)
    if rank in scenario.source.ranks:
        assert isinstance(source.model, Fsdp2Side)
        assert source.model.module is not None
        options = StateDictOptions(full_state_dict=True, strict=True)
        set_model_state_dict(source.model.module, dict(full), options=options)
    refit(scenario, source, destination, plan_refit(source.sharding, destination.sharding))
    assert isinstance(destination.model, VllmSide)
    held = destination.model.model.parameters if destination.model.model is not None else {}
    return {"seeded": full, "held": dict(held)}


def built(argv: list[str]) -> tuple[Scenario, Side, Side]:
    scenario = parse(argv).scenario
    assert dist.group.WORLD is not None
    session = new_session(scenario, CPU, dist.group.WORLD)
    source, destination = (build_side(session, name) for name in ("source", "destination"))
    return scenario, source, destination


def refit(scenario: Scenario, source: Side, destination: Side, plan: RefitPlan) -> None:
    engine, planned = PlannedEngine(scenario, CPU), PlannedSides(plan, cost_of(plan))
    engine.connect(planned, Ranks.of_default_group())
    program = engine.prepare(planned, source, destination)
    with torch.no_grad():
        program.run()
    program.close()


def seeded(scenario: Scenario) -> dict[str, torch.Tensor]:
    assert scenario.model is not None
    model = meta_model(scenario.model, named_model(scenario.model, Dtype.FP32), alone(Dtype.FP32))
    materialise(model, CPU)
    generator, state = torch.Generator().manual_seed(1), model.state_dict()
    for tensor in state.values():
        tensor.normal_(generator=generator)
    return dict(state)


Held = list[dict[str, torch.Tensor]]
"""The tensors of an engine's ranks, in rank order."""


def rebuilt(shape: ModelShape, held: Held, tp: int, rows: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """The state dict that an engine holds: fused tensors taken apart, ranks joined, experts found by the map.

    Written from vLLM's layout alone: [q; k; v], [gate; up], ranks [dp, tp]. Ranks with the same part must agree.
    """
    state: dict[str, torch.Tensor] = {}
    for name in held[0]:
        prefix, dot, last = name.removesuffix(".weight").rpartition(".")
        parts = [rank[name] for rank in held]
        if last in ("w13_weight", "w2_weight"):
            whole = whole_experts(parts, rows[int(name.split(".")[2])])
            module = prefix.removesuffix(".routed_experts")
            state[f"{module}.{'gate_up_proj' if last == 'w13_weight' else 'down_proj'}"] = whole
            continue
        for dp in range(len(held) // tp):
            assert all(torch.equal(parts[dp * tp + rank], parts[rank]) for rank in range(tp)), name
        state |= {f"{prefix}{dot}{key}": tensor for key, tensor in dense(shape, last, parts[:tp])}
    return state


def whole_experts(parts: list[torch.Tensor], row: list[int]) -> torch.Tensor:
    """Every slot's expert, all copies compared."""
    slots = torch.cat(parts)
    assert slots.size(0) == len(row)
    found: dict[int, torch.Tensor] = {}
    for expert, slot in zip(row, slots, strict=True):
        assert torch.equal(found.setdefault(expert, slot), slot), f"copies of expert {expert} differ"
    return torch.stack([found[expert] for expert in sorted(found)])


def dense(shape: ModelShape, last: str, parts: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    tp, size = len(parts), shape.kv_channels
    if last == "qkv_proj":
        heads, groups = shape.num_attention_heads // tp, max(1, shape.num_query_groups // tp)
        cut = [part.split([heads * size, groups * size, groups * size]) for part in parts]
        step = max(1, tp // shape.num_query_groups)
        queries, keys, values = (torch.cat([one[index] for one in cut[:: step if index else 1]]) for index in range(3))
        return [("q_proj.weight", queries), ("k_proj.weight", keys), ("v_proj.weight", values)]
    if last == "fused_qkv_a_proj":
        assert shape.mla is not None
        rank = shape.mla.q_lora_rank or 0
        return [("q_a_proj.weight", parts[0][:rank]), ("kv_a_proj_with_mqa.weight", parts[0][rank:])]
    if last == "gate_up_proj":
        halves = [part.chunk(2) for part in parts]
        whole = parts[0].size(0) == 2 * (shape.experts.ffn_hidden_size if shape.experts else 0)
        chosen = halves[:1] if whole else halves
        return [
            (f"{name}_proj.weight", torch.cat([pair[k] for pair in chosen])) for k, name in enumerate(("gate", "up"))
        ]
    if last in ("q_b_proj", "kv_b_proj", "embed_tokens", "lm_head", "q_proj"):
        return [(f"{last}.weight", torch.cat(parts))]
    if last in ("o_proj", "down_proj"):
        whole = last == "down_proj" and parts[0].size(1) == (shape.experts.ffn_hidden_size if shape.experts else 0)
        return [(f"{last}.weight", parts[0] if whole else torch.cat(parts, dim=1))]
    assert all(torch.equal(part, parts[0]) for part in parts)
    return [(last if last == "e_score_correction_bias" else f"{last}.weight", parts[0])]


@pytest.mark.one_megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tp", "dp"),
    [
        (["--model=tiny_qwen3"], 4, 1),
        (["--model=tiny_qwen3", "--num-query-groups=2"], 4, 1),
        (QWEN_MOE, 2, 2),
        (QWEN_MOE, 1, 4),
        (DEEPSEEK, 2, 2),
        (DEEPSEEK, 4, 1),
    ],
    ids=["qwen3", "replicated-kv-heads", "qwen3_moe", "attention-dp", "deepseek_v3", "deepseek_v3-tp4"],
)
def test_the_engines_tensors_and_the_map_give_the_state_dict(
    ranks: RankPool, maps: dict[str, str], model: list[str], tp: int, dp: int
) -> None:
    routed = "--model=tiny_qwen3" not in model
    placed = [f"--rl-inference-expert-placement={maps['first']}"] if routed else []
    argv = [*SMALL, *model, *FSDP2, *engine(tp, dp, ep=routed), *placed]
    answers = ranks.run(refit_of_a_state_dict, argv)
    shape = parse(argv).scenario.model
    assert shape is not None
    layers = [layer for layer, has in enumerate(shape.experts.layers) if has] if shape.experts else []
    rows = dict(zip(layers, MAPS["first"], strict=True)) if routed else {}
    expected = answers[0]["seeded"]
    if shape.tied_embeddings:
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    found = rebuilt(shape, [answer["held"] for answer in answers[3:7]], tp, rows)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name][: tensor.size(0)], tensor), name
        assert not found[name][tensor.size(0) :].any(), f"{name}: padding"


# --- What goes wrong unseen elsewhere --------------------------------------------------------------------------------


def misfused(rank: int, argv: list[str], name: str, members: tuple[str, ...]) -> Any:
    with mock.patch.dict("refit.predict.vllm.parameters.FUSED", {name: members}):
        return run_scenario(rank, argv)


@pytest.mark.one_megatron
@pytest.mark.parametrize(
    ("model", "name", "members"),
    [
        (QWEN_MOE, "self_attn.qkv_proj.weight", ("q_proj", "v_proj", "k_proj")),
        (DEEPSEEK, "mlp.gate_up_proj.weight", ("up_proj", "gate_proj")),
        (DEEPSEEK, "mlp.shared_experts.gate_up_proj.weight", ("up_proj", "gate_proj")),
    ],
    ids=["qkv", "gate_up", "shared"],
)
def test_a_wrong_fusion_fails_the_forward_check(
    ranks: RankPool, model: list[str], name: str, members: tuple[str, ...]
) -> None:
    """Every element is where the sharding says, so comparing bits cannot find it."""
    prefix = name.removesuffix(".weight").rpartition(".")[0]
    full = tuple(f"{prefix}.{member}.weight" for member in members)
    argv = [*SMALL, "--check-forward", *model, *MEGATRON, *engine(2, 2, ep=True)]
    (answer, *_) = ranks.run(misfused, argv, name, full)
    tested = answer.measurements["refit"].engines["refit"]
    assert tested.num_wrong == 0
    assert tested.forward is not None
    assert not tested.forward.passed
    assert answer.exit_code == 1


@pytest.mark.one_megatron
def stale_plan(rank: int, argv: list[str]) -> dict[str, Any]:
    """Refit with the plan of the first placement after the experts have moved, and with a new plan."""
    scenario, source, destination = built(argv)
    assert dist.group.WORLD is not None
    session = new_session(scenario, CPU, dist.group.WORLD)
    moved = rearranged(session, "destination", destination)
    assert moved is not None
    stale, fresh = (plan_refit(source.sharding, side.sharding) for side in (destination, moved))
    wrong = []
    for plan, side in ((stale, destination), (fresh, moved)):
        if source.weights is not None:
            oracle.fill(source.weights, 0)
        if moved.weights is not None:
            oracle.poison(moved.weights)
        refit(scenario, source, side, plan)
        verdict = oracle.check(moved.weights, source.sharding.tensors, 0) if moved.weights is not None else None
        wrong.append(sorted({tensor.key for tensor in verdict.wrong}) if verdict is not None else [])
    same = {}
    if isinstance(moved.model, VllmSide) and isinstance(destination.model, VllmSide) and moved.model.model is not None:
        assert destination.model.model is not None
        before, after = destination.model.model.parameters, moved.model.model.parameters
        same = {name: tensor is after[name] for name, tensor in before.items()}
    return {"wrong": wrong, "same": same}


def test_a_refit_by_the_old_map_is_found_wrong(ranks: RankPool, maps: dict[str, str]) -> None:
    """Only experts are wrong, and only until the refit is planned anew. The memory is the same throughout."""
    placed = [f"--rl-inference-expert-placement={maps['first']}"]
    placed += [f"--rl-inference-expert-placement-next={maps['second']}"]
    answers = ranks.run(stale_plan, [*SMALL, *QWEN_MOE, *FSDP2, *engine(2, 2, ep=True), *placed])
    for answer in answers[3:7]:
        stale, fresh = answer["wrong"]
        assert stale
        assert all(".mlp.experts." in key for key in stale)
        assert fresh == []
        assert all(answer["same"].values())
