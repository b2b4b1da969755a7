"""Environments without vLLM or with another one, and what a running engine cannot be: refused before it starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from refit.bench.engines import checkpoint_engine
from refit.bench.engines.checkpoint_engine import CheckpointEngine
from refit.cli.parsing import parse
from refit.commands import main
from refit.errors import UnavailableError, UsageError
from refit.models.vllm.engine.available import check_available
from refit.models.vllm.engine.process import installed_version, without_ranks
from refit.models.vllm.engine.side import _check_scales, config_of

FLAGS = ["--model", "tiny_qwen3_moe", "--refit-method", "gloo", "--rl-inference-format", "vllm"]
FLAGS += ["--rl-inference-engine-python", sys.executable]


def with_vllm(folder: Path, version: str) -> Path:
    """A Python whose environment says that it has this vLLM."""
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def test_an_environment_without_vllm() -> None:
    with pytest.raises(UnavailableError, match=r"has no vLLM: make vllm"):
        installed_version(Path(sys.executable))


def test_a_program_that_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("no program")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UnavailableError, match="is no Python that runs"):
        installed_version(tmp_path / "python")


def test_a_version_that_was_not_tried(tmp_path: Path) -> None:
    python = with_vllm(tmp_path, "9.9.9")
    scenario = parse([*FLAGS[:-1], str(python)]).scenario
    with pytest.raises(UnavailableError, match=r"has vLLM 9\.9\.9, tried is 0\.32\.0 on cpu"):
        check_available(scenario, torch.device("cpu"))


def test_on_a_gpu_one_rank_shares_it_with_the_engine() -> None:
    scenario = parse([*FLAGS[:2], *FLAGS[4:], "--refit-method", "cuda-ipc"]).scenario
    with pytest.raises(UnavailableError, match="give --refit-mode collocated and TP 1"):
        check_available(scenario, torch.device("cuda"))


def test_fp8_needs_a_gpu() -> None:
    scenario = parse([*FLAGS, "--rl-inference-dtype", "fp8-block", "--moe-ffn-hidden-size", "256"]).scenario
    with pytest.raises(UnavailableError, match="serves no fp8-block"):
        check_available(scenario, torch.device("cpu"))


def test_the_modules_that_stay_in_16_bits_are_named_as_checkpoints_name_them() -> None:
    flags = [*FLAGS, "--rl-inference-dtype", "fp8-block", "--moe-ffn-hidden-size", "256"]
    scenario = parse([*flags, "--fp8-keep-bf16", "router,embedding,output_layer,linear_qkv"]).scenario
    assert scenario.model is not None
    config = config_of(scenario.model, scenario.destination)["quantization_config"]
    kept = config["modules_to_not_convert"]
    assert config["weight_block_size"] == [128, 128]
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.0.self_attn.k_proj"} <= set(kept)
    assert not [name for name in kept if "o_proj" in name or "experts" in name]


@pytest.mark.parametrize("engine", ["vllm-ipc", "checkpoint-engine"])
def test_an_update_by_cuda_ipc_needs_a_gpu(engine: str) -> None:
    scenario = parse([*FLAGS, "--refit-engine", f"refit,{engine}"]).scenario
    with pytest.raises(UnavailableError, match=f"{engine} updates a running vLLM by CUDA IPC: leave it out on CPUs"):
        check_available(scenario, torch.device("cpu"))


def test_without_checkpoint_engine_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = parse([*FLAGS, "--refit-engine", "refit,checkpoint-engine"]).scenario
    engine = CheckpointEngine(scenario, torch.device("cuda"))
    monkeypatch.setattr(checkpoint_engine, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install 'refit-benchmark\[checkpoint-engine\]'"):
        engine.check_available()


def test_an_engine_that_rounds_scales_gets_such() -> None:
    flags = [*FLAGS, "--rl-inference-dtype", "fp8-block", "--moe-ffn-hidden-size", "256"]
    described = {"version": "0.25.0", "rounds_scales": True}
    side = parse(flags).scenario.destination
    with pytest.raises(UsageError, match=r"follow the rule amax: give --fp8-scale-rule pow2"):
        _check_scales(side, described, "destination")
    _check_scales(side, {**described, "rounds_scales": False}, "destination")
    _check_scales(parse([*flags, "--fp8-scale-rule", "pow2"]).scenario.destination, described, "destination")


def test_sleeping_needs_a_gpu_and_an_engine() -> None:
    scenario = parse([*FLAGS, "--rl-inference-engine-sleep", "2"]).scenario
    with pytest.raises(UnavailableError, match=r"does not sleep \(--rl-inference-engine-sleep 2\): leave it out"):
        check_available(scenario, torch.device("cpu"))
    with pytest.raises(UsageError, match="without an engine that runs: give --rl-inference-engine-python"):
        parse([*FLAGS[:-2], "--rl-inference-engine-sleep", "1"])


def test_a_run_is_waived_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *FLAGS]) == 3
    errors = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(errors) == 1
    assert "has no vLLM" in errors[0]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--rl-inference-expert-model-parallel-size", "2", "--rl-inference-data-parallel-size", "2"],
            "EP 2 in a running",
        ),
        (["--rl-inference-data-parallel-size", "2"], "is one engine with TP"),
        (["--rl-inference-replicas", "2"], "is one engine with TP"),
        (["--rl-inference-pipeline-model-parallel-size", "2"], "is one engine with TP"),
        (["--rl-inference-dtype", "mxfp8"], "is one engine with TP"),
        (["--refit-method", "shm", "--one-sided-buffers", "direct"], "leave it out"),
    ],
)
def test_what_a_running_engine_cannot_be(flags: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse([*FLAGS, *flags])


def test_its_own_update_needs_a_running_engine() -> None:
    with pytest.raises(UsageError, match="give --rl-inference-engine-python"):
        parse([*FLAGS[:-2], "--refit-engine", "refit,vllm-reload"])


def test_a_path_without_a_program() -> None:
    """It may be planned anywhere, and says what is missing where it is run."""
    scenario = parse([*FLAGS[:-1], "no/such/python"]).scenario
    with pytest.raises(UnavailableError, match=r"/no/such/python is no Python that runs: .*: make vllm"):
        check_available(scenario, torch.device("cpu"))


def test_an_engine_is_no_rank_of_the_one_that_starts_it() -> None:
    ours = {"RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default", "MASTER_PORT": "1", "PYTHONPATH": "/here"}
    ours |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    theirs = {"NAME": "a user's", "PATH": "/bin", "VLLM_USE_DEEP_GEMM_E8M0": "0"}
    assert without_ranks({**ours, **theirs}) == theirs
