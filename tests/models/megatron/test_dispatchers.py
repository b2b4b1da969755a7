"""What a dispatcher needs of the machine is named before anything is built."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from refit.cli.parsing import parse
from refit.errors import ExitCode, UnavailableError
from refit.models.megatron.dispatchers import check_available

TRAIN = ["--model", "tiny", "--measure", "train-step", "--expert-model-parallel-size", "2", "--seq-length", "64"]
TRAIN += ["--refit-method", "nccl"]
FLEX = ["--moe-token-dispatcher-type", "flex", "--moe-router-dtype", "fp32"]
NCCL_EP = ["--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "ncclep"]
NCCL_EP += ["--moe-expert-rank-capacity-factor", "1.5"]
OVERLAP = ["--moe-token-dispatcher-type", "alltoall", "--overlap-moe-expert-parallel-comm"]


@pytest.mark.parametrize(
    ("flags", "device", "reason"),
    [
        (FLEX, "cpu", "deepep needs CUDA, the device is cpu"),
        (FLEX, "cuda", "deepep needs the module deep_ep, which is not installed"),
        ([*FLEX, "--moe-flex-dispatcher-backend", "hybridep"], "cuda", "hybridep needs the module deep_ep"),
        (NCCL_EP, "cpu", "ncclep needs CUDA, the device is cpu"),
        (OVERLAP, "cpu", "needs CUDA streams, the device is cpu"),
        ([*OVERLAP, "--delay-wgrad-compute"], "cuda", "needs the layers of Transformer Engine"),
    ],
)
def test_what_is_missing_waives_the_run(flags: list[str], device: str, reason: str) -> None:
    with pytest.raises(UnavailableError, match=reason) as caught:
        check_available(parse([*TRAIN, *flags]).scenario, torch.device(device))
    assert caught.value.exit_code is ExitCode.WAIVED


def test_a_library_without_the_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("deep_ep")
    library.__spec__ = types.SimpleNamespace(name="deep_ep")  # type: ignore[assignment]
    vars(library)["Buffer"] = object
    monkeypatch.setitem(sys.modules, "deep_ep", library)
    check_available(parse([*TRAIN, *FLEX]).scenario, torch.device("cuda"))
    hybrid = parse([*TRAIN, *FLEX, "--moe-flex-dispatcher-backend", "hybridep"]).scenario
    with pytest.raises(UnavailableError, match=r"needs deep_ep\.HybridEPBuffer"):
        check_available(hybrid, torch.device("cuda"))


def test_what_runs_everywhere_needs_nothing() -> None:
    for flags in ([], ["--moe-token-dispatcher-type", "alltoall"]):
        check_available(parse([*TRAIN, *flags]).scenario, torch.device("cpu"))
