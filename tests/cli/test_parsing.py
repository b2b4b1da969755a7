"""Command lines that must work as they stand, and what they mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from refit.cli.parsing import Request, parse
from refit.config.scenario import Mode, Verify
from refit.config.shape import Dtype
from refit.errors import UsageError
from tests.cli.lines import EP_REFIT, KIMI_K2_BY_FLAGS, MINIMAL_TEST, SMALL, TWO_HEADS, scenario, sizes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "title", "source", "destination"),
    [
        (EP_REFIT, "TP2 EP2 ETP1 -> TP2 EP1 ETP1", range(4), range(4, 6)),
        (f"{sizes(2, 2, 2, 2, 'non-collocated', 'nvshmem')} {SMALL}", "TP2 EP2 -> TP2 EP2", range(4), range(4, 8)),
        (f"{sizes(4, 1, 2, 1, 'non-collocated', 'nvshmem')} {SMALL}", "TP4 EP1 -> TP2 EP1", range(4), range(4, 6)),
        (MINIMAL_TEST, "TP2 EP1 -> TP1 EP1", range(2), range(2, 3)),
        (f"{sizes(4, 1, 4, 1, 'non-collocated', 'nvshmem')} {SMALL}", "TP4 EP1 -> TP4 EP1", range(4), range(4, 8)),
        (f"{sizes(1, 4, 1, 2, 'non-collocated', 'nvshmem')} {SMALL}", "TP1 EP4 -> TP1 EP2", range(4), range(4, 6)),
        (f"{sizes(4, 2, 2, 4, 'collocated', 'nccl')} {SMALL}", "TP4 EP2 -> TP2 EP4", range(8), range(8)),
        (f"{sizes(8, 1, 4, 2, 'collocated', 'nccl')} {SMALL}", "TP8 EP1 -> TP4 EP2", range(8), range(8)),
        (f"{sizes(4, 2, 4, 1, 'collocated', 'nccl')} {SMALL}", "TP4 EP2 -> TP4 EP1", range(8), range(4)),
        (f"{sizes(2, 2, 2, 1, 'collocated', 'nccl')} {SMALL}", "TP2 EP2 -> TP2 EP1", range(4), range(2)),
        (KIMI_K2_BY_FLAGS, "TP8 EP8 -> TP8 EP4", range(64), range(64, 96)),
    ],
)
def test_command_lines_that_must_work_as_they_stand(line: str, title: str, source: range, destination: range) -> None:
    run = scenario(line)
    assert run.title == title
    assert (run.source.ranks, run.destination.ranks) == (source, destination)


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [
        ((8, 8, 8, 4, "non-collocated", "nvshmem"), 96),
        ((16, 4, 8, 4, "non-collocated", "nvshmem"), 96),
        ((16, 4, 16, 2, "non-collocated", "nvshmem"), 96),
        ((16, 4, 32, 2, "non-collocated", "nvshmem"), 128),
        ((8, 8, 16, 4, "non-collocated", "nvshmem"), 128),
        ((16, 8, 8, 16, "collocated", "nccl"), 128),
        ((32, 4, 16, 8, "collocated", "nccl"), 128),
    ],
)
def test_the_seven_kimi_k2_scenarios(layout: tuple[int, int, int, int, str, str], num_ranks: int) -> None:
    run = scenario(f"--model kimi_k2 {sizes(*layout)}")
    assert run.num_ranks == num_ranks
    assert run.source.layout.etp == layout[0]
    assert run.destination.layout.etp == layout[2]
    assert run.notes == ()


def test_what_a_command_line_means() -> None:
    run = scenario(EP_REFIT)
    assert (run.mode, run.method, run.engines, run.measurements, run.verify) == (
        Mode.NON_COLLOCATED,
        "nvshmem",
        ("refit",),
        ("refit",),
        Verify.FULL,
    )
    assert (run.num_warmup, run.num_iterations, run.staging_bytes, run.timeout_s) == (2, 3, 512 << 20, 300.0)
    assert run.recorded == {"seq-length": 512, "micro-batch-size": 1}
    assert [note.partition(":")[0] for note in run.notes] == ["assumed"]
    model = run.model
    assert model is not None
    assert (model.num_layers, model.hidden_size, model.kv_channels, model.num_query_groups) == (4, 1024, 128, 8)
    assert (model.ffn_hidden_size, model.max_position_embeddings) == (2688, 512)
    for side in run.sides.values():
        assert (side.format, side.dtype, side.transformer_impl) == ("megatron", Dtype.BF16, "local")
    assert model.experts is not None
    assert (model.experts.num_experts, model.experts.topk, model.experts.layers) == (16, 2, (True,) * 4)
    assert (model.experts.ffn_hidden_size, model.experts.shared_ffn_hidden_size) == (2688, 512)


def test_run_flags() -> None:
    run = scenario(
        f"{TWO_HEADS} --refit-engine both --verify sample --check-forward --staging-mib 64 --timeout 12.5 "
        "--num-benchmark-warmup 0 --num-benchmark-iterations=7 --output-dir out --device cuda --profile-refit "
        "--transformer-impl transformer_engine"
    )
    assert (run.engines, run.verify, run.check_forward, run.staging_bytes) == (
        ("refit", "megatron"),
        Verify.SAMPLE,
        True,
        64 << 20,
    )
    assert (run.timeout_s, run.num_warmup, run.num_iterations, run.output_dir) == (12.5, 0, 7, Path("out"))
    assert {side.transformer_impl for side in run.sides.values()} == {"transformer_engine"}
    assert (run.device, run.profile) == ("cuda", True)


@pytest.mark.parametrize(
    ("text", "engines"), [("both", ("refit", "megatron")), ("megatron,refit,megatron", ("megatron", "refit"))]
)
def test_engines_run_in_the_order_given(text: str, engines: tuple[str, ...]) -> None:
    assert scenario(f"{TWO_HEADS} --refit-engine {text}").engines == engines


def test_flags_that_change_no_weight_are_recorded() -> None:
    run = scenario(
        f"{TWO_HEADS} --use-mcore-models --global-batch-size 64 --train-iters 10 --lr 1e-5 --split 99,1,0 "
        "--tokenizer-type NullTokenizer --sequence-parallel --no-rope-fusion --attention-backend flash "
        "--recompute-modules core_attn mlp --moe-token-dispatcher-type alltoall --context-parallel-size 1 "
        "--rotary-base 1000000 --data-path a b c --swiglu"
    )
    assert run.recorded is not None
    assert run.recorded["use-mcore-models"] is True
    assert run.recorded["global-batch-size"] == 64
    assert run.recorded["lr"] == 1e-5
    assert run.recorded["recompute-modules"] == ["core_attn", "mlp"]
    assert run.recorded["data-path"] == ["a", "b", "c"]
    assert run.recorded["context-parallel-size"] == "1"
    assert run.model is not None
    assert run.model.swiglu


def test_the_script_runs_dry_without_torch_and_megatron(tmp_path: Path) -> None:
    """From another directory, with imports of torch and Megatron made to fail."""
    for blocked in ("torch", "megatron"):
        (tmp_path / blocked).mkdir()
        (tmp_path / blocked / "__init__.py").write_text("raise ImportError('a dry run must not import this')\n")
    argv = [sys.executable, str(ROOT / "benchmark_refit.py"), "--dry-run", "--num-gpus", "8", *EP_REFIT.split()]
    done = subprocess.run(
        argv, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=150, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Idle ranks: 6-7 (not participating)" in done.stdout


def test_a_request_for_a_dry_run() -> None:
    line = "--model tiny --num-gpus 8 --gpus-per-node 4 --cluster h100_ib400"
    request: Request = parse([*line.split(), "--dry-run"])
    assert request.dry_run is not None
    assert (request.dry_run.num_gpus, request.dry_run.gpus_per_node) == (8, 4)
    assert request.dry_run.cluster is not None
    assert request.dry_run.cluster.inter_bytes_per_s == 50e9
    assert parse(["--model", "tiny", "--refit-method", "gloo"]).dry_run is None


def test_how_long_refits_are_repeated() -> None:
    flags = [*SMALL.split(), "--refit-method", "gloo"]
    assert parse(flags).scenario.max_iterations is None
    assert parse([*flags, "--repeat-until-stable"]).scenario.most_iterations == 200
    assert parse([*flags, "--repeat-until-stable=7"]).scenario.max_iterations == 7
    with pytest.raises(UsageError, match="ends before 6 timed refits, the fewest that an interval needs: raise it"):
        parse([*flags, "--repeat-until-stable", "5"])
    with pytest.raises(UsageError, match="ends before 9 timed refits, the fewest that --num-benchmark-iterations"):
        parse([*flags, "--repeat-until-stable=8", "--num-benchmark-iterations=9"])
