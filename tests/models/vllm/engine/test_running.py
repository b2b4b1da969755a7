"""Refits into a real running vLLM, from every trainer, verified in the engine; and faults planted in the engine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from refit.results.status import Status
from tests.models.vllm.engine.running import Run, faulty, needs_vllm, processes, refit
from tests.ranks.waiting import wait_until

pytestmark = needs_vllm

QWEN3 = ["--model", "tiny_qwen3"]
MOE = ["--model", "tiny_qwen3_moe"]
DEEPSEEK = ["--model", "tiny_deepseek_v3", "--kv-lora-rank", "512", "--qk-pos-emb-head-dim", "64"]
DEEPSEEK += ["--moe-layer-freq", "([0]*1+[1]*1)", "--fp32"]

GPT_OSS = ["--model", "tiny_gpt_oss", "--fp32"]


def tp(source: int, destination: int) -> list[str]:
    sizes = ["--tensor-model-parallel-size", str(source), "--rl-inference-tensor-model-parallel-size", str(destination)]
    return [*sizes, "--refit-method", "shm", "--check-forward"]


CASES = {
    "qwen3, megatron, TP2 -> TP1": [*QWEN3, *tp(2, 1)],
    "qwen3, autotp, TP1 -> TP2": [*QWEN3, *tp(1, 2), "--source-format", "autotp"],
    "qwen3-moe, fsdp2, 2 -> TP1": [*MOE, *tp(1, 1), "--source-format", "fsdp2", "--source-world-size", "2"],
    "qwen3-moe, megatron, TP2 -> TP2": [*MOE, *tp(2, 2), "--expert-tensor-parallel-size", "2"],
    "deepseek-v3, megatron, EP2 -> TP1": [*DEEPSEEK, *tp(1, 1), "--expert-model-parallel-size", "2"],
    "deepseek-v3, megatron, TP2 -> TP2": [*DEEPSEEK, *tp(2, 2)],
    "gpt-oss, megatron, EP2 -> TP1": [*GPT_OSS, *tp(1, 1), "--expert-model-parallel-size", "2"],
}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_arrives_and_is_used(tmp_path: Path, case: str) -> None:
    ran = refit(tmp_path, *CASES[case])
    assert ran.code == 0, ran.output
    assert ran.result is not None
    engine = ran.result.refit.engines["refit"]
    served = engine.served
    assert (engine.num_wrong, engine.num_wrong_in_engine) == (0, 0)
    assert engine.num_compared > 0
    assert all(sample.engine_compared > 0 for sample in engine.samples)
    assert served.check.passed
    assert served.check.skipped is None
    assert (served.version, served.num_workers) == ("0.32.0", 2 if "-> TP2" in case else 1)
    assert served.packed
    assert all(list(sample.around_s) == ["pause", "commit", "cache reset", "resume"] for sample in engine.samples)
    assert served.pause_s > engine.median_s
    assert "engine pause" in ran.output


def test_every_weight_of_delta_nets_arrives(tmp_path: Path) -> None:
    """vLLM runs them on CPUs in BF16 only, in which rounding alone may change too much of a pass for a comparison."""
    ran = refit(tmp_path, "--model", "tiny_qwen3_next", *tp(2, 1)[:-1], "--expert-tensor-parallel-size", "2")
    assert ran.code == 0, ran.output
    assert ran.result is not None
    engine = ran.result.refit.engines["refit"]
    assert (engine.num_wrong, engine.num_wrong_in_engine) == (0, 0)
    assert all(sample.engine_compared > 0 for sample in engine.samples)


STEPS = ["--measure", "train-step,refit", "--seq-length", "16", "--global-batch-size", "4", "--micro-batch-size", "2"]
STEPS += ["--num-train-steps", "1", "--num-train-warmup", "1", "--lr", "1e-6"]


@pytest.mark.parametrize("changes", [[], STEPS], ids=["made up", "of optimizer steps"])
def test_what_has_changed_is_sent_into_it(tmp_path: Path, changes: list[str]) -> None:
    ran = refit(tmp_path, *MOE, *tp(1, 1), "--refit-encoding", "delta", *changes)
    assert ran.code == 0, ran.output
    assert ran.result is not None
    engine = ran.result.refit.engines["refit"]
    assert (engine.num_wrong, engine.num_wrong_in_engine) == (0, 0)
    assert all(sample.num_compared > 0 and sample.engine_compared > 0 for sample in engine.samples)
    assert [sample.delta.num_full > 0 for sample in engine.samples][:2] == [True, False]
    assert engine.samples[-1].sent_bytes < 0.5 * engine.samples[0].sent_bytes
    assert engine.served.check.passed


def test_vllms_own_reload_beside_it(tmp_path: Path) -> None:
    """It leaves the packed copy of a tied output layer as it was, which no checksum and no error says."""
    ran = refit(tmp_path, *QWEN3, *tp(1, 1), "--refit-engine", "vllm-reload,refit")
    assert ran.result is not None
    own, ours = (ran.result.refit.engines[name] for name in ("vllm-reload", "refit"))
    assert (own.status, own.num_wrong, own.served.check.passed) == (Status.WRONG_DATA, 0, False)
    assert own.served.check.difference > 0.5
    assert list(own.samples[0].phases_s) == ["gather", "write", "reload"]
    assert own.not_moved
    assert (ran.code, ours.status, ours.served.check.passed) == (0, Status.OK, True)


FAULTS = {
    "byte_corrupted": ": 1 wrong, first at",
    "live_byte_corrupted": "in the engine: model.embed_tokens.weight",
    "commit_skipped": "in the engine: model.embed_tokens.weight",
    "packed_copy_stale": "log-probabilities of",
    "cache_stale": "first generated token 1",
}
"""A fault in the engine, and what a run says of it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(tmp_path: Path, fault: str) -> None:
    ran = refit(tmp_path, *QWEN3, *tp(1, 1), python=faulty(tmp_path, fault))
    assert ran.code == 1, ran.output
    assert FAULTS[fault] in ran.output
    assert_named_once(ran)


DEATHS = {
    "dies_at_start": "'start'",
    "dies_in_pause": "'pause'",
    "dies_in_refit": "'commit'",
    "dies_in_commit": "'commit'",
}


@pytest.mark.parametrize("fault", DEATHS)
def test_an_engine_that_dies_is_named(tmp_path: Path, fault: str) -> None:
    ran = refit(tmp_path, *QWEN3, *tp(1, 1), python=faulty(tmp_path, fault))
    assert ran.code == 4, ran.output
    assert "was killed by signal 9 (SIGKILL) before it answered to " + DEATHS[fault] in ran.output
    assert_named_once(ran)


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    ran = refit(tmp_path, *QWEN3, *tp(1, 2), python=faulty(tmp_path, "worker_dies_in_commit"))
    assert ran.code == 4, ran.output
    assert "vLLM failed in commit" in ran.output
    assert_named_once(ran)


def test_the_engine_ends_with_the_rank_that_has_started_it(tmp_path: Path) -> None:
    def kill_its_rank(token: str, log: Path) -> None:
        wait_until(lambda: "warm-up 1/1" in log.read_text(), 300)
        host = next(pid for pid in processes(token) if b"host.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(Path(f"/proc/{host}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)

    endless = ["--num-benchmark-iterations", "100000"]
    ran = refit(tmp_path, *QWEN3, *tp(1, 1), *endless, meanwhile=kill_its_rank)
    assert ran.code == 4, ran.output
    assert "by signal 9 (SIGKILL)" in ran.output
    assert_named_once(ran)


def test_a_model_that_vllm_refuses(tmp_path: Path) -> None:
    """Its kernel for latent attention on CPUs has one size."""
    ran = refit(tmp_path, "--model", "tiny_deepseek_v3", "--moe-layer-freq", "([0]*1+[1]*1)", *tp(1, 1))
    assert ran.code == 2, ran.output
    assert "vLLM does not start this engine: " in ran.output
    assert_named_once(ran)


def test_another_tp_than_the_engines(tmp_path: Path) -> None:
    ran = refit(tmp_path, *QWEN3, *tp(1, 1), python=faulty(tmp_path, "other_tp"))
    assert ran.code == 4, ran.output
    assert "the vLLM engine runs with TP 4, the destination has TP 1" in ran.output
    assert_named_once(ran)


def assert_named_once(ran: Run) -> None:
    assert "Traceback" not in ran.output
    assert sum(line.startswith(("FAILED: ", "error: ")) for line in ran.output.splitlines()) <= 1
