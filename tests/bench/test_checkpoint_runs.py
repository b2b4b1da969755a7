"""Whole runs from one checkpoint to another: loaded, refitted, verified against the files, written, compared again."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from refit.bench import runner
from refit.checkpoints import write
from refit.cli.parsing import parse
from refit.errors import UnavailableError
from refit.results.checkpoints import LoadResult
from refit.results.refit import RefitResult
from refit.results.status import Status
from tests.bench.test_runner import run_scenario
from tests.checkpoints.made import QWEN3_MOE, as_block_fp8, checkpoint, contents, tensors_of
from tests.ranks.pool import RankError, RankPool

RUN = ("--refit-method=gloo", "--num-benchmark-warmup=1", "--num-benchmark-iterations=1")
VLLM = ("--rl-inference-format=vllm", "--tensor-model-parallel-size=2")


def run(ranks: RankPool, *flags: str) -> Any:
    return ranks.run(run_scenario, [*RUN, *flags])[0]


def run_and_damage(rank: int, argv: list[str], key: str) -> Any:
    """The run of a rank that leaves out one tensor when it writes."""
    whole = write.write

    def without(planned: Any, contents: Any, shards: Any) -> int:
        written = whole(planned, contents, shards)
        for name, stored in planned.stored.tensors.items():
            if name == key and rank == 1:  # the destination, which has written it
                with stored.path.open("r+b") as file:
                    file.seek(stored.offset)
                    file.write(b"\xff\x7f")
        return written

    write.write = without
    try:
        return run_scenario(rank, argv)
    finally:
        write.write = whole


def run_without_space(rank: int, argv: list[str]) -> Any:
    """The run of a rank of which no byte is written."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(os, "pwrite", full):
        return run_scenario(rank, argv)


def test_megatron_to_vllm_is_a_verified_conversion(ranks: RankPool, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "in", QWEN3_MOE)
    result = run(ranks, *VLLM, f"--source-weights={tmp_path / 'in'}", f"--write-weights={tmp_path / 'out'}")
    loaded, refit = result.measurements["load"], result.refit
    assert isinstance(loaded, LoadResult)
    assert isinstance(refit, RefitResult)
    assert list(result.measurements) == ["load", "refit"]
    assert loaded.nbytes == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "in").values())
    assert loaded.file_bytes == sum(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    assert sum(map(bool, loaded.read_bytes_per_rank)) == 2  # the source's ranks
    assert loaded.seconds > 0 < loaded.raw_s
    assert all(extra is None or extra < 256 << 20 for extra in loaded.extra_memory_bytes_per_rank)
    assert refit.tested is not None
    assert refit.tested.num_wrong == 0 < refit.tested.num_compared
    written = refit.tested.written
    assert written is not None
    assert (written.num_wrong, written.compared_with) == (0, str(tmp_path / "in"))
    assert written.num_compared == sum(tensor.numel() for tensor in tensors_of(tmp_path / "in").values())
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "in")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
        assert torch.equal(found, model(tokens).logits)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.no_megatron
def test_block_fp8_in_files_and_other_blocks_in_the_destination(ranks: RankPool, tmp_path: Path) -> None:
    """Codes and scales are those that the rule makes of what the files hold, and of changes of it."""
    wide = (*QWEN3_MOE, "--kv-channels=64", "--moe-ffn-hidden-size=128")  # vLLM's fused tensors need whole blocks
    checkpoint(tmp_path / "bf16", wide)
    values = as_block_fp8(tmp_path / "bf16", tmp_path / "fp8", (32, 40))
    flags = ("--source-format=fsdp2", "--rl-inference-format=vllm", f"--source-weights={tmp_path / 'fp8'}")
    flags = (*flags, "--rl-inference-dtype=fp8-block", "--refit-encoding=delta", f"--write-weights={tmp_path / 'out'}")
    result = run(ranks, *flags)
    written = tensors_of(tmp_path / "out")
    assert {name for name, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn} == values.keys()
    for name, value in values.items():
        bands = [band.split(128, 1) for band in value.bfloat16().float().abs().split(128)]
        scales = torch.stack([torch.stack([block.max() / 448 for block in band]) for band in bands])
        # The last bit of some values has been turned over.
        assert torch.allclose(written[f"{name}_scale_inv"], scales, rtol=1e-2), name
    assert contents(tmp_path / "out", wide).nbytes == result.refit.tested.written.nbytes
    assert result.status is Status.OK
    assert set(result.refit.engines) == {"refit", "full"}
    assert all(engine.num_compared and not engine.num_wrong for engine in result.refit.engines.values())


@pytest.mark.no_megatron
def test_files_with_other_elements_are_wrong_data(ranks: RankPool, tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", QWEN3_MOE)
    flags = ["--source-format=fsdp2", "--rl-inference-format=vllm", f"--source-weights={tmp_path / 'in'}"]
    flags += [*RUN, f"--write-weights={tmp_path / 'out'}"]
    result = ranks.run(run_and_damage, flags, "model.norm.weight")[0]
    assert result.status is Status.WRONG_DATA
    written = result.refit.tested.written
    assert (written.num_wrong, [wrong.key for wrong in written.wrong]) == (1, ["decoder.final_layernorm.weight"])
    assert "1 of 61,920 elements of" in result.refit.tested.fault


@pytest.mark.no_megatron
def test_a_rank_that_cannot_write_leaves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", QWEN3_MOE)
    flags = ["--source-format=fsdp2", "--rl-inference-format=vllm", f"--source-weights={tmp_path / 'in'}", *RUN]
    with pytest.raises(RankError, match=r"rank 1: .*out cannot be written .*No space left on device"):
        ranks.run(run_without_space, [*flags, f"--write-weights={tmp_path / 'out'}"])
    assert os.listdir(tmp_path) == ["in"]


def test_without_the_library_that_verifies_a_run_is_waived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = parse(["--model=tiny_qwen3", "--refit-method=gloo", f"--write-weights={tmp_path / 'out'}"]).scenario
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" else found(name))
    with pytest.raises(UnavailableError, match=r"verified with safetensors, .*pip install 'refit-benchmark\[hf\]'"):
        runner.run(scenario)
