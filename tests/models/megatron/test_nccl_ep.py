"""NCCL EP is named as missing before anything is built, and starts with what Transformer Engine asks for."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from refit.errors import UnavailableError
from refit.models.megatron import nccl_ep
from refit.models.megatron.compat_steps import nccl_ep_starts_for


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A Transformer Engine whose NCCL EP can run, beside a Megatron-Core that knows it."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ep")
    modules = [types.ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    vars(modules[0])["require_nccl_ep"] = lambda: None
    dispatchers = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    monkeypatch.setattr(dispatchers, "_NCCLEPManager", object, raising=False)
    monkeypatch.setattr(nccl_ep, "_ops_may_leave_out_what_they_write", lambda: True)
    return modules[0]


def test_it_is_available_with_all_of_it(engine: types.ModuleType) -> None:
    nccl_ep.check_available()


def test_an_older_nccl_is_named(engine: types.ModuleType) -> None:
    def too_old() -> None:
        raise RuntimeError("NCCL EP requires NCCL >= 2.30.4 at runtime; found 2.28.9")

    vars(engine)["require_nccl_ep"] = too_old
    with pytest.raises(UnavailableError, match=r"found 2\.28\.9.*preload it with LD_PRELOAD"):
        nccl_ep.check_available()


def test_an_older_transformer_engine_is_named(engine: types.ModuleType) -> None:
    del vars(engine)["require_nccl_ep"]
    with pytest.raises(UnavailableError, match=r"needs Transformer Engine 2\.19 or newer"):
        nccl_ep.check_available()


def test_an_older_megatron_is_named(engine: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["megatron.core.transformer.moe.token_dispatcher"], "_NCCLEPManager")
    with pytest.raises(UnavailableError, match=r"needs Megatron-Core 0\.19\.2 or newer, .* is installed"):
        nccl_ep.check_available()


def test_a_torch_that_fails_in_its_ops_is_named(engine: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_ep, "_ops_may_leave_out_what_they_write", lambda: False)
    with pytest.raises(UnavailableError, match=r"custom ops may leave out an argument.*use torch 2\.13"):
        nccl_ep.check_available()


def with_topk(num_experts: int, *, num_topk: int) -> tuple[int, int]:
    return num_experts, num_topk


def without_topk(num_experts: int) -> tuple[int]:
    return (num_experts,)


@pytest.mark.parametrize(
    ("start", "topk", "expected"), [(with_topk, 8, (64, 8)), (without_topk, 8, (64,)), (without_topk, None, (64,))]
)
def test_it_starts_with_the_number_of_experts_of_a_token(
    engine: types.ModuleType, start: Callable[..., Any], topk: int | None, expected: tuple[int, ...]
) -> None:
    library: Any = sys.modules["transformer_engine.pytorch.ep"]
    library.ep_bootstrap = start
    with nccl_ep_starts_for(topk):
        assert library.ep_bootstrap(num_experts=64) == expected
    assert library.ep_bootstrap is start
