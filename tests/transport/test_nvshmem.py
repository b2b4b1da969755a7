"""NVSHMEM without GPUs: the errors where it is missing, too old or too small."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from refit.errors import ExitCode, RefitError, UnavailableError, UsageError
from refit.transport.base import get_transport
from refit.transport.one_sided import nvshmem_library as library


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU and an nvshmem4py whose library has the `version` that a test sets."""
    state = SimpleNamespace(version="3.8.0")
    core = ModuleType("nvshmem.core")
    core.get_version = lambda: SimpleNamespace(libnvshmem_version=state.version)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "find_spec", lambda name: object() if name == "nvshmem" else None)
    monkeypatch.setitem(sys.modules, "nvshmem", ModuleType("nvshmem"))
    monkeypatch.setitem(sys.modules, "nvshmem.core", core)
    return state


@pytest.mark.parametrize("version", ["3.8.0", "3.10.1", "4.0.0"])
def test_a_library_new_enough_is_available(installed: SimpleNamespace, version: str) -> None:
    installed.version = version
    get_transport("nvshmem").check_available()


def test_an_old_library_is_named_with_the_remedy(installed: SimpleNamespace) -> None:
    installed.version = "3.4.5"
    with pytest.raises(
        UnavailableError, match=r"3\.8 or newer, 3\.4\.5 is loaded.*LD_PRELOAD=.*libnvshmem_host"
    ) as caught:
        get_transport("nvshmem").check_available()
    assert caught.value.exit_code == ExitCode.WAIVED
    assert "\n" not in str(caught.value)


def test_a_package_that_does_not_load_is_named(installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvshmem.core", None)
    with pytest.raises(UnavailableError, match=r"nvshmem4py does not load \(.*nvshmem\.core.*pip install"):
        get_transport("nvshmem").check_available()


def test_a_missing_package_is_named(installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"nvshmem4py, which is not installed: pip install .*nccl"):
        get_transport("nvshmem").check_available()


def test_the_heap_is_sized_unless_the_user_has() -> None:
    environ: dict[str, str] = {}
    assert library.size_heap(environ, 1 << 30)
    assert int(environ["NVSHMEM_SYMMETRIC_SIZE"]) == (1 << 30) + library.HEAP_SLACK_BYTES
    environ = {"NVSHMEM_SYMMETRIC_SIZE": "2g"}
    assert not library.size_heap(environ, 1 << 30)
    assert environ == {"NVSHMEM_SYMMETRIC_SIZE": "2g"}


@pytest.mark.parametrize("given", [None, "536870912", "512m", "512M", "0.5g", " 1 G ", "1t"])
def test_a_large_enough_heap_is_taken(given: str | None) -> None:
    library.check_heap_size(given, 512 << 20)


def test_a_small_heap_is_refused_with_both_sizes() -> None:
    with pytest.raises(UsageError, match=r"=511m holds 511 MiB, this refit needs 512 MiB.*raise it to 512m"):
        library.check_heap_size("511m", 512 << 20)
    with pytest.raises(UsageError, match="'lots' is no size"):
        library.check_heap_size("lots", 512 << 20)


def test_memory_that_is_short_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    library.check_room(3 << 30, 5, "use less")
    with pytest.raises(UsageError, match=r"needs 4\.00 GiB .* rank 5 has 3\.00 GiB left: use less"):
        library.check_room(4 << 30, 5, "use less")


def test_what_the_library_raises_becomes_one_line() -> None:
    def fail() -> None:
        raise RuntimeError("no heap\nat all")

    problem = library.attempt(fail)
    assert isinstance(problem, RefitError)
    assert str(problem).startswith("NVSHMEM: no heap (")
    assert library.attempt(lambda: None) is None
