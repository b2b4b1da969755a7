"""`python -m benchmarks.serving_bound`: a row for every shape, in a running vLLM and where there is none."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving_bound import CASES, Case, decoded, own_settings, prompts_of, table
from refit.config.clusters import load_cluster

CLUSTER = load_cluster("h100_ib400")
SMALL = Case("small", ("--model", "tiny_qwen3_moe"), ((1, 32), (4, 64)))


def test_there_are_six_shapes_and_more() -> None:
    for device, cases in CASES.items():
        shapes = [shape for case in cases for shape in case.shapes]
        assert len(shapes) >= 6, device
        for case in cases:
            settings = own_settings(case, 1024, device)
            assert settings["max_num_seqs"] == max(batch for batch, _ in case.shapes)


def test_prompts_differ_and_have_the_context_in_the_middle() -> None:
    prompts = prompts_of(100, 3, 64)
    assert {len(prompt) for prompt in prompts} == {56}
    assert prompts[0] != prompts[1]
    assert prompts == prompts_of(100, 3, 64)


def test_an_engine_that_does_not_start_is_a_row_with_its_reason() -> None:
    rows = [*decoded(SMALL, Path("/bin/false"), CLUSTER, "cpu")]
    assert [(row.batch, row.context, row.seconds) for row in rows] == [(1, 32, None), (4, 64, None)]
    assert all("ended with exit code 1" in row.reason for row in rows)
    assert table(rows).count("ended with exit code 1") == 2
