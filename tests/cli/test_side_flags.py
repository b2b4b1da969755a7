"""The flags of both sides: what a destination takes from the source, and how layers are split."""

from __future__ import annotations

from tests.cli.lines import TWO_HEADS, TWO_STAGES, scenario


def test_a_destination_takes_the_sources_sizes_where_it_has_none_but_etp() -> None:
    run = scenario(f"{TWO_HEADS} --num-experts 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                   "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1")  # fmt: skip
    destination = run.destination.layout
    assert (destination.tp, destination.pp, destination.ep, destination.etp) == (2, 2, 2, 2)
    assert (run.source.layout.etp, run.source.world_size, run.num_ranks) == (1, 8, 16)


def test_experts_folded_over_data_parallel_ranks() -> None:
    run = scenario(
        f"{TWO_HEADS} --num-experts 8 --source-world-size 4 --expert-model-parallel-size 4 "
        "--destination-world-size 2 --rl-inference-expert-model-parallel-size 1"
    )
    source, destination = run.source.layout, run.destination.layout
    assert (source.dp, source.edp, destination.dp, run.num_ranks) == (4, 1, 2, 6)


def test_uneven_stages_of_each_side() -> None:
    run = scenario(
        f"{TWO_HEADS} --num-layers 5 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2 "
        "--rl-inference-decoder-last-pipeline-num-layers 1"
    )
    assert run.source.layout.stage_layers(5) == (range(2), range(2, 5))
    assert run.destination.layout.stage_layers(5) == (range(4), range(4, 5))


def test_virtual_stages_of_each_side() -> None:
    """By their number or by the layers of a chunk; the destination has none of its own accord."""
    plain = scenario(f"{TWO_STAGES} --num-layers 8 --num-virtual-stages-per-pipeline-rank 2")
    assert (plain.source.layout.vpp, plain.destination.layout.vpp) == (2, 1)
    assert (plain.title, plain.source.layout.summary) == ("TP1 EP1 PP2 VPP2 -> TP1 EP1 PP2", "TP=1, PP=2, VPP=2, EP=1")
    assert plain.source.layout.chunk_layers(8) == ((range(2), range(4, 6)), (range(2, 4), range(6, 8)))
    both = scenario(
        f"{TWO_STAGES} --num-layers 8 --num-layers-per-virtual-pipeline-stage 1 "
        "--rl-inference-num-layers-per-virtual-pipeline-stage 2"
    )
    assert (both.source.layout.vpp, both.destination.layout.vpp) == (4, 2)
