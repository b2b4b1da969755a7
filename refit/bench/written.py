"""Writes what a destination holds as a checkpoint, and compares the files with what they should hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from refit.bench import oracle
from refit.bench.clock import timed
from refit.bench.exchange import gather
from refit.bench.file_values import FileValues, source_contents
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.checkpoints import write
from refit.checkpoints.contents import Contents
from refit.checkpoints.layout import PlannedFolder, config_of, files_beside, plan_side
from refit.config.scenario import Scenario
from refit.encodings.oracle import Comparison
from refit.errors import RefitError
from refit.memory.rows import Rows, rows_of
from refit.memory.views import part_within
from refit.memory.weights import LocalShard
from refit.predict.families.config_json import config_values
from refit.results.checkpoints import WriteResult, WrittenTensor

MAX_TENSORS = 20
"""Most tensors with wrong elements that a result names."""

Expected = Callable[[LocalShard, Rows], torch.Tensor]
"""The values `[rows, columns]` that rows of a shard of the destination should have in the files, in its dtype."""


def write_destination(
    session: Session, destination: Side, compared_with: str | None, expected: Expected
) -> WriteResult:
    """Write the destination to the scenario's folder, read it again and compare it, unless `compared_with` is None.

    The folder has its name once everything in it is right or was found wrong; after an error nothing of it is left.
    Collective: every rank of the job. Raises RefitError where it cannot be written.
    """
    scenario = session.scenario
    assert scenario.write_weights is not None
    assert scenario.model is not None
    planned, contents = plan_side(
        scenario.write_weights, scenario.model, destination.spec, destination.sharding.tensors
    )
    mine = [*_own_shards(destination, session.rank, contents)]
    session.enter("write weights")

    def write_all() -> int:
        _together(session, planned, lambda: _create(scenario, planned) if session.is_reporter else None)
        return int(_together(session, planned, lambda: write.write(planned, contents, mine)))

    written = timed(write_all, session.control, session.device)
    seconds, nbytes = zip(*gather(session.control, (written.seconds, written.value)), strict=True)
    if sum(nbytes) != contents.nbytes:
        if session.is_reporter:
            write.discard(planned.partial)
        raise RefitError(f"the ranks wrote {sum(nbytes):,} of the {contents.nbytes:,} bytes of {planned.folder}")
    session.enter("compare written weights")
    verdict = oracle.Verdict(0, ())
    if compared_with is not None:
        verdict = _together(session, planned, lambda: _compared(mine, contents, expected))
    verdicts: list[oracle.Verdict] = gather(session.control, verdict)
    _together(session, planned, lambda: write.finish(planned) if session.is_reporter else None)
    wrong = [tensor for each in verdicts for tensor in each.wrong]
    return WriteResult(
        folder=str(planned.folder),
        num_tensors=len(planned.stored.tensors),
        num_files=len(planned.sizes),
        nbytes=contents.nbytes,
        seconds=max(seconds),
        compared_with=compared_with,
        num_compared=sum(each.num_compared for each in verdicts),
        num_wrong=sum(each.num_wrong for each in verdicts),
        wrong=tuple(WrittenTensor(each.key, each.num_wrong, _first(each.first)) for each in wrong[:MAX_TENSORS]),
    )


def _create(scenario: Scenario, planned: PlannedFolder) -> None:
    assert scenario.model is not None
    assert scenario.destination.dtype is not None
    values: dict[str, Any] = config_values(scenario.model)
    beside = []
    if scenario.source_weights is not None:
        folder = source_contents(scenario).folder
        # What the suite leaves out of a config.json, such as rotary scaling, belongs to the weights all the same.
        values, beside = {**values, **folder.config}, files_beside(folder.path)
    quantisation = scenario.destination.quantisation
    block = quantisation.format if quantisation is not None else None
    write.create(planned, config_of(values, scenario.destination.dtype, block, planned.stored), beside)


def _together(session: Session, planned: PlannedFolder, action: Callable[[], Any]) -> Any:
    """What `action` returns. Where it fails on any rank, the folder is removed, and its error raised on all.

    Collective: every rank of the job.
    """
    found, failed = None, None
    try:
        found = action()
    except RefitError as error:
        failed = f"rank {session.rank}: {error}" if session.rank else str(error)
    first = next((each for each in gather(session.control, failed) if each is not None), None)
    if first is not None:
        dist.barrier(session.control)
        if session.is_reporter:
            write.discard(planned.partial)
        raise RefitError(first)
    return found


def _own_shards(side: Side, rank: int, contents: Contents) -> Iterator[LocalShard]:
    """Parts of this rank's shards that no rank before it holds, none twice, without rows of padding."""
    for shard in side.weights or ():
        key = shard.tensor.key
        left = [shard.box]
        if shard.box.offsets:
            end = min(shard.box.ends[0], contents.num_rows(key))
            left = [shard.box.narrow(0, shard.box.offsets[0], end)] if end > shard.box.offsets[0] else []
        for other in side.sharding.by_key[key].shards:
            if min(other.ranks) < rank:
                left = [part for box in left for part in box.subtract(other.box)]
        for box in left:
            yield LocalShard(shard.tensor, box, shard.owner, part_within(shard.view, shard.box, box))


def _compared(shards: list[LocalShard], contents: Contents, expected: Expected) -> oracle.Verdict:
    """Compare the files with what is `expected`, as bits, where this rank has written."""
    files, tally = FileValues(contents), oracle.Tally()
    for shard in shards:
        for block in rows_of(shard):
            found = files.values(shard.tensor, block, 0)
            tally.add(Comparison(shard.tensor.key, expected(shard, block), found, partial(_place, shard, block)))
    return tally.verdict


def _place(shard: LocalShard, block: Rows, row: int, column: int) -> tuple[int, ...]:
    """Row number and column in the whole tensor."""
    return int(block.row_numbers[row]), block.first_column + column


def _first(first: oracle.Mismatch) -> str:
    row, column = first.index
    return f"in row {row}, column {column}: expected {first.expected:g}, found {first.found:g}"
