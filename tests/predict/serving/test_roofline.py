"""Bounds of passes: against the operations that a TFLOP/s figure counts, figures by hand, and their own promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from refit.config.clusters import load_cluster
from refit.config.routing import Routing
from refit.predict.flops import forward_flops
from refit.predict.serving.experts import Slots
from refit.predict.serving.network import Moved, all_reduce, dispatch
from refit.predict.serving.roofline import ALL_REDUCE, ALL_TO_ALL, CACHE, MEMORY, NETWORK, Serving
from tests.predict.serving.test_layout import FP8, scenario_of, served

H100 = load_cluster("h100_ib400")


def serving(model: str, layout: str, *flags: str, routing: Routing | None = None) -> Serving:
    scenario = scenario_of(model, layout, *flags)
    assert scenario.model is not None
    assert scenario.destination.dtype is not None
    found = Serving(scenario.model, scenario.destination.dtype, served(scenario), H100)
    return found if routing is None else replace(found, routing=routing)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama3_8b", "vllm TP1"),
        ("tiny", "TP1"),
        ("tiny_deepseek_v3", "TP1"),
        ("tiny_qwen3_moe", "vllm TP1 DP4 EP4"),
        ("qwen3_30b_a3b", "vllm TP1"),
        ("qwen3_next_80b_a3b", "vllm TP1"),
        ("tiny_qwen3_next", "TP1"),
    ],
)
def test_a_prefill_has_the_operations_of_a_forward_pass(model: str, layout: str) -> None:
    """Without TP nothing is computed twice."""
    found = serving(model, layout)
    bound = found.prefill(2, 128, all_logits=True)
    flops = sum(term.other_flops for term in bound.terms)
    world = len(found.served.bytes_by_rank)
    assert flops * world == pytest.approx(forward_flops(found.shape, 2 * found.served.replicas, 128))


def test_a_decode_step_of_a_dense_model_by_hand() -> None:
    """llama3_8b: 8.03 B parameters without the embedding 7.5 B, of which each is read once."""
    found = serving("llama3_8b", "vllm TP1")
    bound = found.decode(4, 1024)
    shape = found.shape
    weights = found.served.bytes_by_rank[0] - 2 * shape.vocab_size * shape.hidden_size
    cache = 4 * 1024 * 2 * shape.num_query_groups * shape.kv_channels * 2 * shape.num_layers
    assert sum(term.nbytes for term in bound.terms) == pytest.approx(weights + cache)
    assert bound.seconds == pytest.approx((weights + cache) / 3350e9)
    assert {term.limited_by for term in bound.terms} == {MEMORY}
    assert next(term for term in bound.terms if term.name == CACHE).nbytes == cache


@pytest.mark.parametrize("layout", ["vllm TP8 DP8 EP64", "TP8 EP8", "vllm TP8 PP4 x2", "TP4 EP16 ETP4 PP2"])
def test_terms_add_up_and_more_work_takes_no_less(layout: str) -> None:
    found = serving("kimi_k2", layout)
    bounds = [found.decode(batch, context) for batch, context in ((1, 128), (8, 128), (8, 4096), (64, 4096))]
    assert all(bound.seconds == sum(term.seconds for term in bound.terms) for bound in bounds)
    seconds = [bound.seconds for bound in bounds]
    assert seconds == sorted(seconds)
    assert all(term.seconds > 0 for bound in bounds for term in bound.terms)


def test_fp8_halves_what_is_read_of_quantised_weights() -> None:
    plain, quantised = (
        {term.name: term for term in serving("tiny_qwen3_moe", "vllm TP1", *flags).decode(4, 64).terms}
        for flags in (FP8[:-1], FP8)
    )
    assert quantised["routed experts"].nbytes == pytest.approx(plain["routed experts"].nbytes / 2, rel=0.01)
    assert quantised["routed experts"].fp8_flops == plain["routed experts"].other_flops
    assert quantised["output layer"] == plain["output layer"]


def test_a_slower_link_between_nodes_counts_where_experts_are_on_several() -> None:
    across, within = serving("kimi_k2", "vllm TP1 DP64 EP64"), serving("kimi_k2", "vllm TP8 x8")
    moved = {term.name: term for term in across.decode(8, 1024).terms}
    assert moved[ALL_TO_ALL].limited_by == NETWORK
    assert ALL_TO_ALL not in {term.name for term in within.decode(8, 1024).terms}
    alone = replace(across, cluster=replace(H100, inter_bytes_per_s=None))
    assert math.isinf(alone.decode(8, 1024).seconds)


def test_redundant_copies_spread_a_popular_expert() -> None:
    """Eight experts, top-2: 4/9 of all choices go to expert 0, of which a second copy is on another rank."""
    routing = Routing("measured", ((4.0, *[1.0] * 5, 0.0, 0.0),) * 2)
    layouts = ("vllm TP1 DP4 EP4", "vllm TP1 DP4 EP4 +4")
    bounds = [serving("tiny_qwen3_moe", layout, routing=routing).prefill(8, 64) for layout in layouts]
    busiest = [next(term for term in bound.terms if term.name == "routed experts").other_flops for bound in bounds]
    assert busiest[1] / busiest[0] == pytest.approx((4 / 2 + 1 + 1 / 2) / (4 + 1), rel=0.2)
    even = serving("tiny_qwen3_moe", layouts[0]).prefill(8, 64)
    assert next(term for term in even.terms if term.name == "routed experts").other_flops < busiest[0]


def test_collectives_by_hand() -> None:
    """16 ranks on two nodes of 8: 1/8 of the bytes is reduced with the other node's counterpart."""
    assert all_reduce(800.0, range(8), 8) == Moved(2 * 7 / 8 * 800, 0.0)
    assert all_reduce(800.0, range(16), 8) == Moved(2 * 7 / 8 * 800, 2 * 1 / 2 * 100)
    assert all_reduce(800.0, [3], 8) == Moved(0.0, 0.0)
    # Every token goes to all experts: 4 tokens on each of 4 ranks, on two nodes. To each node come the other's 8 tokens
    # once, 4 to each of its ranks, and a rank gets the 12 tokens that it does not have.
    slots = Slots.of([(0,), (1,), (2,), (3,)], [1.0] * 4)
    assert dispatch(1.0, 16, slots, range(4), 1, 2) == Moved(12 - 4, 4)


def test_all_reduce_is_none_without_tp() -> None:
    assert ALL_REDUCE not in {term.name for term in serving("llama3_8b", "vllm TP1").decode(1, 8).terms}
    assert ALL_REDUCE in {term.name for term in serving("llama3_8b", "vllm TP2").decode(1, 8).terms}
