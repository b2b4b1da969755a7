"""CUDA IPC without GPUs: what stands in its way is named before any model is built."""

from __future__ import annotations

import pytest
import torch

from refit.errors import ExitCode, UnavailableError
from refit.transport.base import TransportOptions, get_transport


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two ranks of one host that see two GPUs with access to each other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, peer: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return monkeypatch


def test_gpus_with_access_to_each_other_will_do(two_gpus: pytest.MonkeyPatch) -> None:
    get_transport("cuda-ipc").check_available()


def test_a_gpu_without_access_to_a_peer_is_named(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(torch.cuda, "can_device_access_peer", lambda here, peer: False)
    with pytest.raises(UnavailableError, match=r"GPU 1 has none to GPU 0: .*nccl") as caught:
        get_transport("cuda-ipc").check_available()
    assert caught.value.exit_code == ExitCode.WAIVED


def test_a_mig_instance_is_refused(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 MIG 1g.18gb")
    with pytest.raises(UnavailableError, match=r"MIG instance \(NVIDIA H200 MIG 1g.18gb\): .*gloo"):
        get_transport("cuda-ipc").check_available()


def test_ranks_that_do_not_see_all_gpus_are_refused_with_both_numbers(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnavailableError, match=r"sees 1 for 2 ranks: .*CUDA_VISIBLE_DEVICES"):
        get_transport("cuda-ipc").check_available()


def test_ranks_may_share_gpus_and_still_need_access_between_them(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setenv("LOCAL_WORLD_SIZE", "4")
    two_gpus.setenv("LOCAL_RANK", "2")
    get_transport("cuda-ipc").check_available(TransportOptions(ranks_per_gpu=2))
    two_gpus.setattr(torch.cuda, "can_device_access_peer", lambda here, peer: False)
    with pytest.raises(UnavailableError, match=r"GPU 0 has none to GPU 1"):
        get_transport("cuda-ipc").check_available(TransportOptions(ranks_per_gpu=2))
    two_gpus.setattr(torch.cuda, "device_count", lambda: 1)
    get_transport("cuda-ipc").check_available(TransportOptions(ranks_per_gpu=4))
    with pytest.raises(UnavailableError, match=r"sees 1 for 4 ranks"):
        get_transport("cuda-ipc").check_available(TransportOptions(ranks_per_gpu=3))


@pytest.mark.parametrize(
    ("method", "reason"),
    [("nccl", "NCCL refuses two ranks on one GPU"), ("nvshmem", "without MPS, NVSHMEM's processes")],
)
def test_methods_that_need_a_gpu_per_rank_say_why(two_gpus: pytest.MonkeyPatch, method: str, reason: str) -> None:
    two_gpus.setattr("torch.distributed.is_nccl_available", lambda: True)
    with pytest.raises(
        UnavailableError, match=f"{method} needs a GPU per rank, .* 2 puts 2 ranks on 1 .{reason}.*cuda-ipc"
    ):
        get_transport(method).check_available(TransportOptions(ranks_per_gpu=2))


def test_a_machine_without_gpus_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"has none: use --refit-method shm or gloo"):
        get_transport("cuda-ipc").check_available()
