"""`--refit-method auto`: the first method that the machine and the scenario allow, with the reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from refit.bench.method_choice import check_hosts, with_method
from refit.cli.parsing import parse
from refit.config.registry import AUTO
from refit.config.scenario import Scenario
from refit.errors import UnavailableError
from refit.transport.base import TransportOptions
from refit.transport.one_sided.nixl.transport import NixlTransport
from refit.transport.one_sided.nvshmem import NvshmemTransport
from refit.transport.one_sided.shm import SharedMemoryTransport
from refit.transport.two_sided.nccl import NcclTransport

HERE = ["here"] * 2


def scenario(*flags: str) -> Scenario:
    return parse(["--model", "tiny", "--refit-method", "auto", *flags]).scenario


def test_cpus_of_one_host_take_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = with_method(scenario(), HERE)
    assert (chosen.method, chosen.device) == ("shm", "cpu")
    assert chosen.notes[-1] == "--refit-method auto: shm: the first choice on CPUs"


def test_several_hosts_of_cpus_take_shared_memory_and_gloo_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchrun has started all of them here, as where hosts are containers or network namespaces of one machine.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    chosen = with_method(scenario("--device", "cpu"), ["a"] * 4 + ["b"] * 4)
    assert chosen.method == "shm+gloo"
    assert "shm needs all ranks on one host, 8 ranks are on 2 (a, b): use shm+gloo" in chosen.notes[-1]


def test_several_agents_of_torchrun_on_one_host_are_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert with_method(scenario("--device", "cpu"), ["a"] * 8).method == "shm"


def test_a_named_method_of_one_host_is_refused_on_several() -> None:
    with pytest.raises(
        UnavailableError, match=r"^cuda-ipc needs all ranks on one host, 6 ranks are on 3 \(a, b, ...\)"
    ):
        check_hosts("cuda-ipc", ["a", "a", "b", "b", "c", "c"])
    check_hosts("shm+gloo", ["a", "b"])
    check_hosts(AUTO, ["a", "b"])


def test_gpus_without_peer_access_or_nvshmem_take_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object, options: TransportOptions) -> None:
        raise UnavailableError("nvshmem4py is missing")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, peer: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(NvshmemTransport, "check_available", missing)
    monkeypatch.setattr(NcclTransport, "check_available", lambda _, options: None)
    chosen = with_method(scenario(), HERE)
    assert (chosen.method, chosen.device) == ("nccl", "cuda")
    assert "GPU 0 has none to GPU 1" in chosen.notes[-1]
    assert "nvshmem4py is missing" in chosen.notes[-1]


def test_ranks_that_share_a_gpu_take_cuda_ipc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    chosen = with_method(scenario("--ranks-per-gpu", "2"), HERE)
    assert (chosen.method, chosen.device) == ("cuda-ipc", "cuda")


def test_without_any_method_all_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(reason: str) -> Callable[..., None]:
        def check(_: object, options: TransportOptions) -> None:
            raise UnavailableError(reason)

        return check

    monkeypatch.setattr(SharedMemoryTransport, "check_available", refused("no /dev/shm"))
    monkeypatch.setattr(NixlTransport, "check_available", refused("no nixl"))
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"no method can run here: no /dev/shm; gloo needs .*; no nixl$"):
        with_method(scenario("--device", "cpu"), HERE)


def test_a_named_method_stays() -> None:
    named = parse(["--model", "tiny", "--refit-method", "gloo"]).scenario
    assert with_method(named, HERE) is named
