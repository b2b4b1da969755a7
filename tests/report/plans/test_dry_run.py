"""What a dry run says, and how long it takes for the largest model."""

from __future__ import annotations

import json
import re

import pytest

from refit.cli.main import main
from refit.cli.parsing import parse
from refit.predict.dry_run import dry_run
from refit.report.plans.dry_run import dry_run_text
from refit.report.plans.dry_run_json import dry_run_json
from refit.report.plans.rank_map import rank_map

TINY = "--model tiny --dry-run --tensor-model-parallel-size 2 --expert-model-parallel-size 2"
KIMI_K2 = "--model kimi_k2 --dry-run --tensor-model-parallel-size 8 --expert-model-parallel-size 8"


def text_of(line: str) -> str:
    request = parse(line.split())
    assert request.dry_run is not None
    return dry_run_text(dry_run(request.scenario, request.dry_run))


def figure(text: str, label: str) -> str:
    return next(line.removeprefix(label).strip() for line in text.splitlines() if line.startswith(label))


def test_rank_map_with_idle_ranks() -> None:
    run = parse(f"{TINY} --rl-inference-expert-model-parallel-size 1".split()).scenario
    assert rank_map(run, 8).splitlines() == [
        "World size: 8 (using 6 GPUs)",
        "Source ranks: 0-3 (TP=2, PP=1, EP=2)",
        "Destination ranks: 4-5 (TP=2, PP=1, EP=1)",
        "Idle ranks: 6-7 (not participating)",
    ]


def test_rank_map_of_a_full_and_of_a_shared_world() -> None:
    run = parse(TINY.split()).scenario
    assert rank_map(run, 8).splitlines() == [
        "World size: 8 (using 8 GPUs)",
        "Source ranks: 0-3 (TP=2, PP=1, EP=2)",
        "Destination ranks: 4-7 (TP=2, PP=1, EP=2)",
    ]
    small = "--rl-inference-tensor-model-parallel-size 1 --rl-inference-expert-model-parallel-size 1"
    run = parse(f"{TINY} {small} --refit-mode collocated".split()).scenario
    assert rank_map(run, 5).splitlines()[1:] == [
        "Source ranks: 0-3 (TP=2, PP=1, EP=2)",
        "Destination ranks: 0 (TP=1, PP=1, EP=1)",
        "Idle ranks: 4 (not participating)",
    ]


def test_figures_of_disjoint_sides() -> None:
    text = text_of(f"{TINY} --rl-inference-expert-model-parallel-size 1 --num-gpus 8 --cluster h200_nvlink")
    assert figure(text, "GPUs needed:") == "4 + 2 = 6"
    assert figure(text, "Model:").startswith("tiny, 8.987 M parameters (8,986,880 with buffers)")
    assert figure(text, "Local:") == "0 bytes within a GPU"
    assert figure(text, "Payload:").split(" in ")[0] == figure(text, "Wire:").removesuffix(" between GPUs")
    assert figure(text, "Lower bound:").endswith("within its node at 391 GB/s")
    assert "Memory per source GPU:" in text
    table = text.splitlines()[-7:]
    assert table[0].split() == ["rank", "source", "MiB", "dest.", "MiB", "sent", "MB", "received", "MB", "local", "MB"]
    assert [row.split()[0] for row in table[1:]] == ["0", "1", "2", "3", "4", "5"]
    assert table[1].split()[2] == "-"
    assert table[6].split()[1] == "-"


def test_collocated_memory_is_both_sides_on_one_gpu() -> None:
    request = parse(f"{TINY} --refit-mode collocated --staging-mib 1".split())
    assert request.dry_run is not None
    run = dry_run(request.scenario, request.dry_run)
    text = dry_run_text(run)
    held = run.source_bytes[0] + run.destination_bytes[0]
    assert figure(text, "Memory per GPU:").startswith(
        f"{(held + (1 << 20)) / 2**20:,.1f} MiB (weights {held / 2**20:,.1f} MiB"
    )
    assert figure(text, "GPUs needed:") == "max(4, 4) = 4"
    assert figure(text, "Wire:") == "0 bytes between GPUs"


def test_ranks_that_share_gpus_are_told_from_the_gpus() -> None:
    request = parse(f"{TINY} --ranks-per-gpu 8 --cluster h200_nvlink --staging-mib 1".split())
    assert request.dry_run is not None
    run = dry_run(request.scenario, request.dry_run)
    text = dry_run_text(run)
    num_ranks = request.scenario.num_ranks
    assert (run.num_gpus, figure(text, "GPUs needed:")) == (1, f"1, for {request.scenario.num_ranks_text} ranks")
    assert text.startswith(f"World size: {num_ranks} (using {num_ranks} ranks, up to 8 per GPU)")
    held = sum(run.source_bytes.values()) + sum(run.destination_bytes.values())
    assert figure(text, "Memory per GPU:").startswith(f"{(held + num_ranks * (1 << 20)) / 2**20:,.1f} MiB")
    wire = figure(text, "Payload:").split(" in ")[0]
    assert figure(text, "Wire:") == f"{wire} between ranks, {wire} of them on one GPU"
    assert f"GPU 0 copies {wire} within its memory" in figure(text, "Lower bound:")
    assert json.loads(dry_run_json(run))["ranks_per_gpu"] == num_ranks


def test_too_small_gpus_and_notes_are_pointed_out() -> None:
    wide = "--rl-inference-expert-model-parallel-size 4 --rl-inference-expert-tensor-model-parallel-size 1"
    text = text_of(f"{KIMI_K2} {wide} --expert-tensor-parallel-size 1 --cluster h100_ib400")
    assert "MORE THAN the 74.51 GiB of h100_ib400" in figure(text, "Memory per source GPU:")
    dense = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-experts 32 --disable-bias-linear"
    assert "Note: without --moe-ffn-hidden-size each of 32 experts" in text_of(f"--dry-run {dense}")
    assert "give the speeds of a cluster with --cluster" in text_of(f"--dry-run {dense}")


def test_json_has_the_figures_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{TINY} --rl-inference-expert-model-parallel-size 1 --num-gpus 8 --cluster h200_nvlink"
    assert main([*line.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_parameters"], found["num_ranks"], found["num_gpus"]) == (8_986_880, 6, 8)
    assert found["scenario"]["source"]["layout"]["ep"] == 2
    plan, traffic = found["plan"], found["traffic"]
    assert plan["payload_bytes"] == plan["wire_bytes"] == sum(plan["received_by_rank"].values())
    assert traffic["received_within"] == [0] * 4 + [plan["received_by_rank"][rank] for rank in "45"]
    assert found["bound"]["seconds"] == pytest.approx(max(traffic["received_within"]) / 391e9)
    assert found["memory_bytes"] == plan["destination_weights_by_rank"]["4"] + found["scenario"]["staging_bytes"]
    assert found["fits_memory"] is True


def test_json_without_a_cluster_judges_nothing_and_too_small_gpus_are_an_error_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TINY.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bound"], found["fits_memory"]) == (None, None)
    wide = "--rl-inference-expert-model-parallel-size 4 --rl-inference-expert-tensor-model-parallel-size 1 --json"
    assert main([*f"{KIMI_K2} {wide} --expert-tensor-parallel-size 1 --cluster h100_ib400".split()]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits_memory"] is False
    assert captured.err.startswith("error: ")
    assert main(["--json", "--model", "tiny", "--refit-method", "gloo"]) == 2
    assert "--json needs --dry-run" in capsys.readouterr().err


def test_kimi_k2_on_96_gpus() -> None:
    text = text_of(f"{KIMI_K2} --rl-inference-expert-model-parallel-size 4 --cluster h100_ib400")
    assert figure(text, "GPUs needed:") == "64 + 32 = 96 (12 nodes of 8)"
    assert figure(text, "Model:").startswith("kimi_k2, 1.026 T parameters (1,026,408,232,448 with buffers)")
    assert figure(text, "Memory per destination GPU:").startswith("62.56 GiB (weights 62.06 GiB")
    assert figure(text, "Busiest receiver:") == ("rank 64, 66.64 GB (0 bytes within its node, 66.64 GB between nodes)")
    assert figure(text, "Lower bound:") == "1.333 s on h100_ib400: rank 64 receives 66.64 GB between nodes at 50 GB/s"
    assert [line.split()[0] for line in text.splitlines()[-5:]] == ["source", "dest.", "sent", "received", "local"]


def test_bytes_between_nodes_are_named_where_there_are_several() -> None:
    text = text_of(f"{TINY} --refit-mode collocated --rl-inference-tensor-model-parallel-size 4")
    assert "nodes" not in figure(text, "Busiest sender:")
    text = text_of(f"{TINY} --gpus-per-node 4")
    for label, rank in (("Busiest sender:", 0), ("Busiest receiver:", 4)):
        assert figure(text, label).startswith(f"rank {rank}, ")
        assert "(0 bytes within its node, " in figure(text, label)


def test_no_bound_where_a_cluster_knows_one_host_only() -> None:
    line = f"{KIMI_K2} --rl-inference-expert-model-parallel-size 4 --cluster"
    assert figure(text_of(f"{line} h200_nvlink"), "Lower bound:") == (
        "none: h200_nvlink has no speed between nodes (inter_node_gb_per_s) and bytes cross nodes of 8 GPUs"
    )
    assert figure(text_of(f"{line} gb200_nvl72"), "Lower bound:").endswith(
        "rank 72 receives 66.64 GB between nodes at 50 GB/s"
    )


def test_an_fp8_destination_is_set_against_the_source_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--dry-run --model tiny --tensor-model-parallel-size 2 --rl-inference-dtype fp8-block"
    assert main(line.split()) == 0
    quantised = capsys.readouterr().out
    assert main(line.removesuffix(" --rl-inference-dtype fp8-block").split()) == 0
    plain = capsys.readouterr().out
    wire = re.search(r"^Wire: +(.*) between GPUs", plain, re.MULTILINE)
    assert wire is not None
    assert re.search(rf"^With bfloat16: +{re.escape(wire[1])} between GPUs; fp8-block sends .* % less", quantised, re.M)
    assert re.search(r"^Sent as fp8-block: +[\d,]+ of [\d,]+ blocks", quantised, re.M)
    assert "With bfloat16" not in plain
