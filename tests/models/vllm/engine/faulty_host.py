"""The process of a running engine with a fault planted: `faulty_host.py INSIDE FAULT FD PARENT`, with vLLM's Python.

A fault is a function of this module. It changes the classes before the engine starts.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

inside, fault = sys.argv[1:3]
sys.path.insert(0, inside)
sys.argv[1:3] = []

import host  # noqa: E402
import refit_worker  # noqa: E402

Host: Any = host.Host
Worker: Any = refit_worker.RefitWorker


def second_time(method: str, of: Any, instead: Any) -> None:
    """From its second call on, a method does something else. The first is that of the engine's start."""
    original, calls = getattr(of, method), [0]

    def changed(self: Any, *args: Any) -> Any:
        calls[0] += 1
        return original(self, *args) if calls[0] == 1 else instead(original, self, *args)

    setattr(of, method, changed)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def byte_corrupted() -> None:
    """One byte of a norm, which is written live, changes before the commit."""

    def corrupting(original: Any, self: Any) -> Any:
        norm = next(each for each in self.refit_weights if each.name == "model.norm.weight")
        norm.memory.view(refit_worker.torch.uint8)[3] ^= 1
        return original(self)

    second_time("refit_commit", Worker, corrupting)


def live_byte_corrupted() -> None:
    """One byte of the embedding that the engine looks tokens up in changes after the commit."""

    def corrupting(original: Any, self: Any) -> Any:
        found = original(self)
        live = next(each.live for each in self.refit_weights if each.name == "model.embed_tokens.weight")
        live.data.view(refit_worker.torch.uint8)[0, 3] ^= 0x40
        return found

    second_time("refit_commit", Worker, corrupting)


def commit_skipped() -> None:
    second_time("refit_commit", Worker, lambda original, self: {})


def packed_copy_stale() -> None:
    """Linears get their weights, but are not packed again: their packed copies are those of the start."""
    original, packed = Worker.refit_process, set()

    def once(self: Any, module: Any) -> str:
        if "Linear" not in type(module).__name__ or id(module) not in packed:
            packed.add(id(module))
            return str(original(self, module))
        module.weight = refit_worker.torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)
        return "linears"

    Worker.refit_process = once


def cache_stale() -> None:
    Host.reset_cache = lambda self: 0.0


def dies_at_start() -> None:
    Host.describe = lambda self: die()


def dies_in_pause() -> None:
    Host.pause = lambda self: die()


def dies_in_refit() -> None:
    """Right after it has answered that it is paused."""
    original, paused = Host.pause, list[bool]()

    def pause(self: Any) -> float:
        paused.append(True)
        return float(original(self))

    class Connection(host.Connection):  # type: ignore[misc]
        def send(self, value: Any) -> None:
            super().send(value)
            if paused:
                die()

    Host.pause, host.Connection = pause, Connection


def dies_in_commit() -> None:
    Host.commit = lambda self: die()


def worker_dies_in_commit() -> None:
    """The process of the second worker."""
    original = Host.commit

    def commit(self: Any) -> Any:
        os.kill(self.workers[-1]["pid"], signal.SIGKILL)
        return original(self)

    describe = Host.describe

    def remembering(self: Any) -> Any:
        found = describe(self)
        self.workers = found["workers"]
        return found

    Host.describe, Host.commit = remembering, commit


def other_tp() -> None:
    describe = Host.describe
    Host.describe = lambda self: {**describe(self), "tp": 4}


if __name__ == "__main__":
    globals()[fault]()
    host.main()
