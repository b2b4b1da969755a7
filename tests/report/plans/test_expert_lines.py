"""The expert placement that a dry run prints, against maps written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

from refit.cli.parsing import parse
from refit.predict.dry_run import DryRun, DryRunOptions, dry_run
from refit.report.plans.dry_run import dry_run_text
from refit.report.plans.expert_lines import expert_lines

FLAGS = ["--dry-run", "--model=tiny_qwen3_moe", "--rl-inference-format=vllm"]
ENGINE = ["--rl-inference-data-parallel-size=2", "--rl-inference-expert-model-parallel-size=2"]


def run(*flags: str, gpus_per_node: int = 2) -> DryRun:
    return dry_run(parse([*FLAGS, *flags]).scenario, DryRunOptions(gpus_per_node=gpus_per_node))


def test_experts_are_printed_by_node_and_gpu(tmp_path: Path) -> None:
    """One source rank: rank 0 is on node 0 with the engine's first, its second is on node 1."""
    file = tmp_path / "map.json"
    rows = [[0, 2, 4, 6, 7, 5, 3, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    file.write_text(json.dumps(rows))
    lines = expert_lines(run(*ENGINE, f"--rl-inference-expert-placement={file}"))
    assert lines[1:6] == [
        "Experts of vllm TP1 DP2 EP2 placed: 4 per GPU and layer; 8 experts in 8 places of 2 GPUs",
        "layer 0:",
        "  node 0: GPU 1: 0, 2, 4, 6",
        "  node 1: GPU 2: 1, 3, 5, 7",
        "layer 1:",
    ]
    assert lines[6:8] == ["  node 0: GPU 1: 0-3", "  node 1: GPU 2: 4-7"]


def test_redundant_copies_cost_what_they_weigh() -> None:
    found = run(*ENGINE, "--rl-inference-num-redundant-experts=8")
    assert found.linear is not None
    expert = 2 * 3 * 256 * 192  # bytes of one in one layer
    within, between = (
        int((found.traffic.sent_within - found.linear.traffic.sent_within).sum()),
        int((found.traffic.sent_between - found.linear.traffic.sent_between).sum()),
    )
    assert (within, between) == (2 * 4 * expert, 2 * 4 * expert)
    text = "\n".join(expert_lines(found))
    assert "layers 0-1:\n  node 0: GPU 1: 0-7\n  node 1: GPU 2: 0-7" in text
    assert "This placement beside linear: +2.36 MB within nodes, +2.36 MB between nodes" in text


def test_slices_are_told_from_whole_experts() -> None:
    lines = expert_lines(run("--rl-inference-tensor-model-parallel-size=2"))
    assert "8 per GPU and layer, 1/2 of each; 8 experts in 16 places of 2 GPUs" in lines[1]
    assert not any("beside linear" in line for line in lines)


def test_the_next_placement_follows_and_other_formats_have_no_map() -> None:
    text = dry_run_text(run(*ENGINE, "--rl-inference-expert-placement-next=round_robin"))
    before, after = text.split("After the experts are placed anew:")
    assert "GPU 1: 0-3" in before
    assert "GPU 1: 0, 2, 4, 6" in after
    scenario = parse(["--dry-run", "--model=tiny", "--rl-inference-expert-model-parallel-size=2"]).scenario
    assert expert_lines(dry_run(scenario, DryRunOptions())) == []


def test_more_ranks_than_experts_have_no_linear_placement_to_compare_with() -> None:
    sizes = ["--rl-inference-data-parallel-size=16", "--rl-inference-expert-model-parallel-size=16"]
    assert run(*sizes, "--rl-inference-num-redundant-experts=8").linear is None
