"""A pool of rank processes, forked from one that has imported torch and Megatron once.

`RankPool(8).run(function, *args)` calls `function(rank, *args)` on every rank, with a Gloo process group over all of
them, and returns the results in rank order. A rank that raises, dies or hangs fails the call with every rank's
traceback; the next call starts a fresh set of ranks.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

HOST = "127.0.0.1"
PATIENCE_S = 30.0
"""How long ranks may take to notice that one of them has failed, on a busy machine."""


class RankError(AssertionError):
    """One or more ranks failed; the text holds each rank's traceback."""


class RankPool:
    """`enter(rank)` is called on each rank before it meets the others.

    Ranks meet at a store in this process, as those of `refit run` do at their launcher's. Where `enter` moves them to
    networks that do not reach it, they meet `in_file`: whoever waits there looks once in 10 ms.
    """

    def __init__(
        self, num_ranks: int = 8, enter: Callable[[int], None] = lambda rank: None, *, in_file: bool = False
    ) -> None:
        self.num_ranks = num_ranks
        self._enter = enter
        self._in_file = in_file
        self._store: Store | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 170.0) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = self._collect(timeout_s)
        if errors:
            self.stop()
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(self.num_ranks)]

    def _collect(self, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(self.num_ranks), strict=True))
        while waiting:
            # Once one rank has failed, other ranks may wait for it for ever: wait a while for them, then report.
            ready = wait(list(waiting), timeout=PATIENCE_S if errors else timeout_s)
            if not ready:
                errors.update(dict.fromkeys(waiting.values(), "no answer in time"))
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "died"
                (results if ok else errors)[rank] = value
        return results, errors

    def _start(self) -> None:
        # Forked children must not inherit OpenMP's threads, and 8 ranks on few cores want one thread each.
        torch.set_num_threads(1)
        context = mp.get_context("fork")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        with socket.create_server((HOST, 0), backlog=self.num_ranks) as listener:
            port = listener.getsockname()[1]

            def meet(rank: int) -> Store:
                listener.close()
                self._enter(rank)
                if self._in_file:
                    assert self._folder is not None
                    return FileStore(f"{self._folder.name}/store", self.num_ranks)
                return TCPStore(HOST, port, is_master=False)

            for rank in range(self.num_ranks):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self.num_ranks, meet, theirs), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(mine)
            if not self._in_file:  # after the forks: it has threads
                self._store = TCPStore(
                    HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
                )

    def kill(self, rank: int) -> None:
        """End `rank` at once, as a machine that is lost."""
        os.kill(self._processes[rank].pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the ranks; the next `run` starts a fresh set, in about 0.2 s."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _serve(rank: int, num_ranks: int, meet: Callable[[int], Store], pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
    torch.distributed.init_process_group("gloo", store=meet(rank), rank=rank, world_size=num_ranks)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
