"""The process that imports for all ranks: what it does where they cannot be forked."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from refit.cli import forked, torchrun

FLAGS = ["--model=tiny", "--refit-method=gloo"]


class Replaced(Exception):
    """In place of this process, another program would run."""


def test_ranks_are_spawned_where_an_import_uses_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a fork would leave them without a GPU. Torch's question to NVML is for the process that forks alone."""
    launcher = pytest.importorskip("refit.bench.launcher")
    ran: list[tuple[str, list[str], dict[str, str]]] = []

    def execve(*program: object) -> None:
        ran.append(program)  # type: ignore[arg-type]
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torchrun, "end_with_parent", lambda _: None)
    monkeypatch.setattr(launcher, "uses_cuda", lambda: True)
    monkeypatch.setattr(launcher, "load_libraries", lambda _: None)
    monkeypatch.setenv(forked.NVML_CHECK, "0")
    with pytest.raises(Replaced):
        forked.launch_ranks(7, 2, FLAGS)
    ((path, command, environment),) = ran
    assert (path, command) == (sys.executable, torchrun.command(7, 2, FLAGS))
    assert environment[forked.NVML_CHECK] == "0"
    assert "spawned" in capsys.readouterr().err
