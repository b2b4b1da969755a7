"""Refits that send changes, of whole models between ranks, and what goes wrong when they are changed."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from refit.bench.engines.refit import PlannedEngine
from refit.bench.runner import benchmark
from refit.bench.session import new_session
from refit.cli.parsing import parse
from refit.encodings.delta import cpu
from refit.encodings.delta.versions import Versions
from refit.errors import RefitError
from refit.results.result import ResultFile, read_result
from refit.results.shares import share_rows
from refit.results.status import Status
from refit.transport.base import Program, RunReport
from tests.ranks.pool import RankPool
from tests.seams.test_encodings import FP8, WAYS
from tests.seams.test_seams import FLAGS, LAYOUTS

DELTA = ["--refit-encoding", "delta", "--num-benchmark-iterations", "3", "--num-benchmark-warmup", "1"]

COLLOCATED = [*LAYOUTS, "--refit-mode", "collocated"]


def run_scenario(
    rank: int, argv: list[str], broken: str | None = None, directory: str | None = None, model: Sequence[str] = FLAGS
) -> Any:
    """The result, what was printed, and on rank 0 the content of the file. `broken` is one of MUTANTS, on all ranks."""
    printed = io.StringIO()
    mutant = MUTANTS[broken]() if broken else contextlib.nullcontext()
    with mutant, contextlib.redirect_stdout(printed):
        scenario = parse([*model, *DELTA, *argv]).scenario
        assert dist.group.WORLD is not None
        file = ResultFile.create(Path(directory), "run") if directory and rank == 0 else None
        try:
            result = benchmark(new_session(scenario, torch.device("cpu"), dist.group.WORLD), file)
        except RefitError as error:
            return str(error), printed.getvalue(), None
        return result, printed.getvalue(), read_result(file.path) if file else None


@pytest.mark.parametrize(
    ("sides", "way"),
    [
        *((LAYOUTS, way) for way in WAYS),
        (FP8, WAYS[0]),
        (FP8, WAYS[2]),
        (COLLOCATED, WAYS[1]),
    ],
)
def test_changes_are_sent(ranks: RankPool, way: list[str], sides: list[str], tmp_path: Path) -> None:
    result, output, stored = ranks.run(run_scenario, [*sides, "--refit-method", *way], None, str(tmp_path))[0]
    engine = result.refit.engines["refit"]
    assert stored.refit.engines["refit"] == engine
    assert (result.exit_code, engine.status, engine.num_wrong) == (0, Status.OK, 0), output
    first, *later = engine.samples
    assert first.sent_bytes > 0.99 * result.refit.plan.wire_bytes
    most = 0.1 if sides is not FP8 else 1.01  # a change of one weight can move the scale of a block, and all its codes
    assert all(sample.sent_bytes < most * first.sent_bytes for sample in later)
    assert first.delta.full_because.endswith("nothing was sent before")
    for sample in later:
        assert sample.delta.num_full == 0
        assert sample.delta.asked_share == 0.01
        assert sample.delta.num_changed > 0
        assert sample.delta.place_bytes + sample.delta.value_bytes < sample.sent_bytes
    assert stored.refit.engines["full"].num_wrong == 0
    assert len(stored.refit.engines["full"].measured_s) == 3
    assert "x as fast as full in this run" in output


@pytest.mark.one_megatron
@pytest.mark.parametrize("num_warmup", ["1", "2"])
def test_shares_take_turns_and_each_is_measured_as_often(ranks: RankPool, num_warmup: str) -> None:
    shares = ["--delta-changed-share", "0.5%", "--delta-changed-share", "25%"]
    shares += ["--num-benchmark-warmup", num_warmup]
    result, output, _ = ranks.run(run_scenario, [*LAYOUTS, "--refit-method", "gloo", *shares])[0]
    engine = result.refit.engines["refit"]
    assert (engine.num_wrong, engine.num_timed, len(engine.measured_s)) == (0, 6, 3)
    rows = {row.asked_share: row for row in share_rows(result.refit)}
    assert list(rows) == [0.005, 0.25]
    for share, row in rows.items():
        assert row.num_refits == 3
        assert row.changed_share == pytest.approx(share, rel=0.05)
    assert rows[0.005].sent_bytes < rows[0.25].sent_bytes
    assert "Changes sent" in output


@contextmanager
def a_joiner() -> Iterator[None]:
    """Before the second refit every destination loses its weights, and says so."""
    begin, unpack = Versions.begin, cpu.CpuDecoder.unpack

    def forgetful(self: Versions) -> None:
        if self.version == 1:
            self.weights.forget("it has joined")
        begin(self)

    def empty(self: Any, payload: torch.Tensor, length: torch.Tensor) -> None:
        if self._versions.version == 2:
            for piece in self._pieces:
                piece.write(np.zeros_like(piece.read()))
        unpack(self, payload, length)

    with mock.patch.object(Versions, "begin", forgetful), mock.patch.object(cpu.CpuDecoder, "unpack", empty):
        yield


@pytest.mark.one_megatron
def run_with_joiner(rank: int, argv: list[str]) -> Any:
    with a_joiner():
        return run_scenario(rank, argv)


def test_a_joiner_gets_everything_and_the_result_says_why(ranks: RankPool) -> None:
    result, output, _ = ranks.run(run_with_joiner, [*LAYOUTS, "--refit-method", "gloo"])[0]
    engine = result.refit.engines["refit"]
    assert (engine.status, engine.num_wrong) == (Status.OK, 0), output
    assert [sample.delta.num_full > 0 for sample in engine.samples] == [True, True, False, False]
    assert engine.samples[1].delta.full_because.endswith("it has joined")


class Sleepy:
    """A program that takes a quarter of a second longer."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.staging_bytes, self.close = program.staging_bytes, program.close

    def run(self) -> RunReport:
        time.sleep(0.25)
        return self.program.run()


def run_auto(rank: int, argv: list[str], slower: str) -> Any:
    """`slower` is what takes a quarter of a second longer: `changes` or `everything`."""
    everything, unpack = PlannedEngine._everything, cpu.CpuDecoder.unpack

    def sleepy_unpack(self: Any, payload: torch.Tensor, length: torch.Tensor) -> None:
        time.sleep(0.25 * (slower == "changes"))
        unpack(self, payload, length)

    def sleepy_everything(*args: Any) -> Any:
        program = everything(*args)
        return Sleepy(program) if slower == "everything" else program

    with (
        mock.patch.object(PlannedEngine, "_everything", sleepy_everything),
        mock.patch.object(cpu.CpuDecoder, "unpack", sleepy_unpack),
    ):
        return run_scenario(rank, [*argv, "--refit-encoding", "auto", "--num-benchmark-warmup", "7"])


@pytest.mark.one_megatron
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "way", "slower"),
    [
        (LAYOUTS, WAYS[0], "changes"),
        (LAYOUTS, WAYS[1], "everything"),
        (LAYOUTS, WAYS[2], "changes"),
        (FP8, WAYS[0], "everything"),
        (FP8, WAYS[2], "everything"),
    ],
    ids=["bf16-0-changes", "bf16-1-everything", "bf16-2-changes", "fp8-0-everything", "fp8-2-everything"],
)
def test_auto_sends_what_was_faster(ranks: RankPool, sides: list[str], way: list[str], slower: str) -> None:
    result, output, _ = ranks.run(run_auto, [*sides, "--refit-method", *way], slower)[0]
    engine = result.refit.engines["refit"]
    assert (engine.status, engine.num_wrong) == (Status.OK, 0), output
    is_full = [sample.delta.num_full > 0 for sample in engine.samples]
    assert is_full[:5] == [True, False, False, True, True]
    assert is_full[7:] == [slower == "changes"] * 3, output
    if slower == "changes":
        assert "Sent in full: 8 of 10 refits" in output
        assert "everything was sent, which had been faster" in output


MUTANTS: dict[str, Callable[[], Any]] = {}
"""What each name does wrong, on every rank."""


def mutant(broken: Callable[[], Any]) -> Callable[[], Any]:
    made = contextmanager(broken)
    MUTANTS[broken.__name__] = made
    return made


@mutant
def dropped_block() -> Iterator[None]:
    """The first block with changes of each message says that it has none."""
    pack = cpu.CpuEncoder._pack_changes

    def broken(self: Any, message: Any, table: Any) -> int:
        end = pack(self, message, table)
        changed = np.flatnonzero(table[:, 1])
        if len(changed):
            table[changed[0], 1] = 0
        return end

    with mock.patch.object(cpu.CpuEncoder, "_pack_changes", broken):
        yield


@mutant
def position_off_by_one() -> Iterator[None]:
    apply = cpu.unpack_block

    def broken(form: Any, count: int, num: int, data: Any, dtype: Any) -> Any:
        positions, values = apply(form, count, num, data, dtype)
        return np.minimum(positions + 1, num - 1), values

    with mock.patch.object(cpu, "unpack_block", broken):
        yield


@mutant
def value_of_the_version_before() -> Iterator[None]:
    take_changes = cpu.take_changes

    def stale(old: Any, new: Any) -> Any:
        before = old.copy()
        positions, _ = take_changes(old, new)
        return positions, before[positions]

    with mock.patch.object(cpu, "take_changes", stale):
        yield


@mutant
def snapshot_runs_ahead() -> Iterator[None]:
    """It takes a change before that has been sent."""
    take_changes = cpu.take_changes

    def broken(old: Any, new: Any) -> Any:
        if len(old):
            old[: len(old) // 2] = new[: len(new) // 2]
        return take_changes(old, new)

    with mock.patch.object(cpu, "take_changes", broken):
        yield


@mutant
def swallowed_apply() -> Iterator[None]:
    unpack = cpu.CpuDecoder.unpack

    def broken(self: Any, payload: torch.Tensor, length: torch.Tensor) -> None:
        if self._versions.version != 2:
            unpack(self, payload, length)

    with mock.patch.object(cpu.CpuDecoder, "unpack", broken):
        yield


@mutant
def wrong_base() -> Iterator[None]:
    """A source sends changes to a destination that has joined anew, and that does not look."""
    with (
        a_joiner(),
        mock.patch.object(Versions, "_why_full", lambda self: self.snapshot.reason if not self.version > 1 else None),
        mock.patch.object(Versions, "check", return_value=None),
    ):
        yield


@pytest.mark.one_megatron
@pytest.mark.parametrize(
    ("broken", "way"),
    [*((name, WAYS[0]) for name in sorted(MUTANTS)), *((name, WAYS[1]) for name in ("swallowed_apply", "wrong_base"))],
)
def test_mutants_are_found(ranks: RankPool, broken: str, way: list[str]) -> None:
    result, output, _ = ranks.run(run_scenario, [*LAYOUTS, "--refit-method", *way], broken)[0]
    engine = result.refit.engines["refit"]
    assert engine.status is Status.WRONG_DATA, output
    assert engine.num_wrong > 0
