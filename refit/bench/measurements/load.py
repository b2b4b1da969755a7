"""The load measurement: fills the source from a checkpoint, beside a plain read of the same files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from refit.bench import page_cache
from refit.bench.clock import timed
from refit.bench.exchange import gather
from refit.bench.file_values import source_contents
from refit.bench.memory import peak_bytes, reset_peak, used_bytes
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.checkpoints.load import load
from refit.report.refits import checkpoint_lines
from refit.results.checkpoints import LoadResult

RAW_CHUNK_BYTES = 8 << 20


class LoadMeasurement:
    """The `Measurement` named `load`."""

    def run(self, session: Session, source: Side, destination: Side) -> LoadResult:
        contents = source_contents(session.scenario)
        files, weights, host = contents.folder.files, source.weights, torch.device("cpu")
        session.start.enter("load")
        session.enter("plain read of the checkpoint")
        raw_cold = _dropped(session, files)
        raw = timed(lambda: _read_share(files, session.rank, session.world_size), session.control, session.device)
        session.enter("load weights")
        cold = _dropped(session, files)
        is_known = reset_peak(host)
        before, shared = used_bytes(host), _shares_columns(session, source)
        loaded = timed(
            lambda: load(weights, contents, shared=shared) if weights is not None else 0,
            session.control,
            session.device,
        )
        held = weights.nbytes if weights is not None else 0
        # Some of the weights may have been resident before, and freed memory may still be.
        extra = (
            max(0, peak_bytes(host) - min(before + held, used_bytes(host)))
            if is_known and session.device.type == "cpu"
            else None
        )
        ranks = gather(session.control, (raw.seconds, loaded.seconds, loaded.value, held, extra))
        result = LoadResult(
            folder=str(contents.folder.path),
            num_tensors=contents.num_tensors,
            num_files=len(files),
            nbytes=contents.nbytes,
            file_bytes=sum(files.values()),
            seconds=max(each[1] for each in ranks),
            raw_s=max(each[0] for each in ranks),
            read_bytes_per_rank=tuple(each[2] for each in ranks),
            weights_bytes_per_rank=tuple(each[3] for each in ranks),
            extra_memory_bytes_per_rank=tuple(each[4] for each in ranks),
            cold_share=cold,
            raw_cold_share=raw_cold,
        )
        session.say(checkpoint_lines.loaded(result))
        return result


def _shares_columns(session: Session, source: Side) -> bool:
    """Whether the ranks of a tensor-parallel group, which are neighbours, share a host."""
    hosts = session.ranks.host_of
    mine = [rank for rank in source.spec.ranks if hosts[rank] == hosts[session.rank]]
    return len(mine) % source.spec.layout.tp == 0


def _dropped(session: Session, files: Mapping[Path, int]) -> float | None:
    """Drop the files on every host. Returns how much of them is not in the cache of the first one.

    Collective: every rank of the job.
    """
    dist.barrier(session.control)  # nobody is reading them
    hosts = session.ranks.host_of
    is_first = hosts[session.rank] not in hosts[: session.rank]
    found: list[float | None] = gather(session.control, page_cache.drop(files) if is_first else None)
    return found[0]


def _read_share(files: Mapping[Path, int], rank: int, num_ranks: int) -> None:
    """Read every `num_ranks`th part of all files one after the other, part number `rank`, as plainly as can be."""
    total, buffer, begin = sum(files.values()), bytearray(RAW_CHUNK_BYTES), 0
    first, last = total * rank // num_ranks, total * (rank + 1) // num_ranks
    for path, size in files.items():
        at, end = max(first - begin, 0), min(last - begin, size)
        if at < end:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, at, end - at, os.POSIX_FADV_SEQUENTIAL)
                while at < end:
                    count = os.preadv(descriptor, [memoryview(buffer)[: min(len(buffer), end - at)]], at)
                    at = at + count if count else end
            finally:
                os.close(descriptor)
        begin += size
