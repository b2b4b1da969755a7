"""The cases of a weight reshard that planners get wrong, each as a literal table.

Rows read: box offsets + extents, source rank -> destination rank. Source ranks count from 0, destinations follow.
"""

from __future__ import annotations

import pytest

from refit.errors import PlanError
from refit.plan.box import Box
from refit.plan.plan import ZEROS
from refit.plan.planner import plan_refit
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec
from tests.plan.strategies import cut, side


def table(spec: TensorSpec, source: list[list[Box]], destination: list[list[Box]], first: int | None = None) -> set:
    """The plan of one tensor as a set of (offsets, extents, source, destination)."""
    first = len(source) if first is None else first
    held = side(range(len(source)), {spec: source})
    wanted = side(range(first, first + len(destination)), {spec: destination})
    return {(t.box.offsets, t.box.extents, t.source, t.destination) for t in plan_refit(held, wanted).transfers()}


def rows(size: int, tp: int, width: int = 1) -> list[list[Box]]:
    return [[cut((size, width), 0, tp, rank)] for rank in range(tp)]


def gated(size: int, tp: int) -> list[list[Box]]:
    """[gate; up] of `size` rows: rank r holds part r of each half."""
    return [[cut((size, 1), 0, 2 * tp, rank), cut((size, 1), 0, 2 * tp, rank + tp)] for rank in range(tp)]


def test_tp_2_to_3() -> None:
    assert table(TensorSpec("w", (6, 1), "bfloat16"), rows(6, 2), rows(6, 3)) == {
        ((0, 0), (2, 1), 0, 2),
        ((2, 0), (1, 1), 0, 3),
        ((3, 0), (1, 1), 1, 3),
        ((4, 0), (2, 1), 1, 4),
    }


def test_tp_6_to_4() -> None:
    assert table(TensorSpec("w", (12, 1), "bfloat16"), rows(12, 6), rows(12, 4)) == {
        ((0, 0), (2, 1), 0, 6),
        ((2, 0), (1, 1), 1, 6),
        ((3, 0), (1, 1), 1, 7),
        ((4, 0), (2, 1), 2, 7),
        ((6, 0), (2, 1), 3, 8),
        ((8, 0), (1, 1), 4, 8),
        ((9, 0), (1, 1), 4, 9),
        ((10, 0), (2, 1), 5, 9),
    }


def test_gated_fc1_keeps_gate_and_up_apart() -> None:
    """Plain row intervals would send rank 0's up half where gate belongs."""
    assert table(TensorSpec("fc1", (8, 1), "bfloat16"), gated(8, 2), gated(8, 4)) == {
        ((0, 0), (1, 1), 0, 2),
        ((1, 0), (1, 1), 0, 3),
        ((2, 0), (1, 1), 1, 4),
        ((3, 0), (1, 1), 1, 5),
        ((4, 0), (1, 1), 0, 2),
        ((5, 0), (1, 1), 0, 3),
        ((6, 0), (1, 1), 1, 4),
        ((7, 0), (1, 1), 1, 5),
    }


def test_gated_expert_under_changed_etp_and_ep() -> None:
    """ETP2 EP1 -> ETP1 EP2, 2 experts of [gate; up] with 2 rows each: every expert arrives by its global number."""
    shape = (2, 4, 1)
    source = [[cut(shape, 1, 4, rank), cut(shape, 1, 4, rank + 2)] for rank in range(2)]
    destination = [[cut(shape, 0, 2, rank)] for rank in range(2)]
    assert table(TensorSpec("experts.fc1", shape, "bfloat16", stacked=True), source, destination) == {
        ((0, 0, 0), (1, 1, 1), 0, 2),
        ((0, 1, 0), (1, 1, 1), 1, 2),
        ((0, 2, 0), (1, 1, 1), 0, 2),
        ((0, 3, 0), (1, 1, 1), 1, 2),
        ((1, 0, 0), (1, 1, 1), 0, 3),
        ((1, 1, 0), (1, 1, 1), 1, 3),
        ((1, 2, 0), (1, 1, 1), 0, 3),
        ((1, 3, 0), (1, 1, 1), 1, 3),
    }


def test_experts_up_and_down() -> None:
    shape, spec = (4, 2, 1), TensorSpec("experts.fc2", (4, 2, 1), "bfloat16", stacked=True)
    ep1, ep2 = [[Box.whole(shape)]], [[cut(shape, 0, 2, rank)] for rank in range(2)]
    assert table(spec, ep2, ep1) == {((0, 0, 0), (2, 2, 1), 0, 2), ((2, 0, 0), (2, 2, 1), 1, 2)}
    assert table(spec, ep1, ep2) == {((0, 0, 0), (2, 2, 1), 0, 1), ((2, 0, 0), (2, 2, 1), 0, 2)}


def test_pipeline_stage_moves_whole_tensors() -> None:
    layer0, layer1 = TensorSpec("layers.0.w", (2,), "bfloat16"), TensorSpec("layers.1.w", (2,), "bfloat16")
    whole: list[Box] = [Box.whole((2,))]
    source = side(range(2), {layer0: [whole, []], layer1: [[], whole]})
    destination = side(range(2, 3), {layer0: [whole], layer1: [whole]})
    moves = {(t.tensor.key, t.source, t.destination) for t in plan_refit(source, destination).transfers()}
    assert moves == {("layers.0.w", 0, 2), ("layers.1.w", 1, 2)}


def test_cut_at_the_source_and_replicated_at_the_destination() -> None:
    spec, whole = TensorSpec("q_down", (4, 1), "bfloat16"), [Box.whole((4, 1))]
    assert table(spec, rows(4, 2), [whole, whole]) == {
        ((0, 0), (2, 1), 0, 2),
        ((2, 0), (2, 1), 1, 2),
        ((0, 0), (2, 1), 0, 3),
        ((2, 0), (2, 1), 1, 3),
    }


def test_replicated_at_the_source_and_cut_at_the_destination_uses_both_replicas() -> None:
    spec, whole = TensorSpec("q_down", (4, 1), "bfloat16"), [Box.whole((4, 1))]
    assert table(spec, [whole, whole], rows(4, 2)) == {((0, 0), (2, 1), 0, 2), ((2, 0), (2, 1), 1, 3)}


def test_collocated_copies_what_it_holds_and_fetches_the_rest() -> None:
    spec = TensorSpec("w", (4, 1), "bfloat16")
    assert table(spec, rows(4, 2), [[Box.whole((4, 1))]], first=0) == {((0, 0), (2, 1), 0, 0), ((2, 0), (2, 1), 1, 0)}


def test_vocabulary_padding_that_no_source_holds_is_zeroed() -> None:
    held = side(range(1), {TensorSpec("emb", (8, 2), "bfloat16", padded=True): [[Box.whole((8, 2))]]})
    wanted = side(range(1, 3), {TensorSpec("emb", (12, 2), "bfloat16", padded=True): rows(12, 2, width=2)})
    assert {(t.box.offsets, t.box.extents, t.source, t.destination) for t in plan_refit(held, wanted).transfers()} == {
        ((0, 0), (6, 2), 0, 1),
        ((6, 0), (2, 2), 0, 2),
        ((8, 0), (4, 2), ZEROS, 2),
    }
    back = plan_refit(wanted, held)
    assert {(t.box.offsets, t.box.extents, t.source) for t in back.transfers()} == {
        ((0, 0), (6, 2), 1),
        ((6, 0), (2, 2), 2),
    }


def test_sides_that_hold_different_tensors_are_refused() -> None:
    one, other = TensorSpec("w", (4, 1), "bfloat16"), TensorSpec("w", (6, 1), "bfloat16")
    with pytest.raises(PlanError, match=r"shape \[4, 1\] at the source, \[6, 1\] at the destination"):
        plan_refit(side(range(1), {one: rows(4, 1)}), side(range(1), {other: rows(6, 1)}))
    extra = TensorSpec("bias", (4, 1), "bfloat16")
    with pytest.raises(PlanError, match="1 tensors only at the destination"):
        plan_refit(side(range(1), {one: rows(4, 1)}), side(range(1), {one: rows(4, 1), extra: rows(4, 1)}))


def test_a_hole_in_the_source_is_refused() -> None:
    spec = TensorSpec("w", (4, 1), "bfloat16")
    with pytest.raises(PlanError, match="no source holds"):
        table(spec, [[cut((4, 1), 0, 2, 0)]], [[Box.whole((4, 1))]])


def test_senders_of_replicated_weights_end_even() -> None:
    """Eight source ranks that all hold everything, as with TP1: none sends more than 5 % over the mean."""
    tensors = {f"t{i}": TensorSpec(f"t{i}", (1 << (10 + i % 12), 64), "bfloat16") for i in range(60)}
    everywhere = {
        key: TensorSharding((ReplicatedShard(Box.whole(spec.shape), tuple(range(8))),)) for key, spec in tensors.items()
    }
    here = {key: TensorSharding((ReplicatedShard(Box.whole(spec.shape), (8, 9)),)) for key, spec in tensors.items()}
    plan = plan_refit(Sharding(tuple(range(8)), tensors, everywhere), Sharding((8, 9), tensors, here))
    sent = [int(plan.nbytes[plan.source == rank].sum()) for rank in range(8)]
    assert max(sent) <= 1.05 * sum(sent) / 8


def test_a_replica_on_the_same_node_is_preferred() -> None:
    spec, whole = TensorSpec("w", (4, 1), "bfloat16"), [Box.whole((4, 1))]
    source = side(range(4), {spec: [whole] * 4})
    destination = side(range(4, 8), {spec: [whole] * 4})
    plan = plan_refit(source, Sharding(destination.ranks, destination.tensors, destination.by_key), ranks_per_node=3)
    assert {(t.source, t.destination) for t in plan.transfers() if t.destination in (4, 5)} == {(3, 4), (3, 5)}
