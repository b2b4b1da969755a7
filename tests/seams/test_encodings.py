"""Adding an encoding: one file and one row. It runs over every transport of CPUs, alone and after FP8."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from refit.bench.runner import benchmark
from refit.bench.session import new_session
from refit.cli.flags import full_parser
from refit.cli.parsing import parse
from refit.config.registry import ENCODINGS
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.report.plans.dry_run import dry_run_text
from refit.results.result import ResultFile, read_result
from refit.results.status import Status
from tests.ranks.pool import RankPool
from tests.seams import nonzero_rows
from tests.seams.nonzero_rows import CHANGES, ROWS
from tests.seams.test_seams import FLAGS, LAYOUTS
from tests.transport.test_transports import EXECUTORS

SENT_AS_ROWS = [*LAYOUTS, "--refit-encoding", "rows"]
FP8 = ["--rl-inference-dtype", "mxfp8", "--tensor-model-parallel-size", "4", "--expert-model-parallel-size", "1"]
FP8 += ["--rl-inference-tensor-model-parallel-size", "1", "--rl-inference-expert-model-parallel-size", "2"]
FP8 += ["--rl-inference-expert-tensor-model-parallel-size", "1"]
"""Some blocks are whole at a source rank, others are cut: 16 columns of blocks of 32."""

WAYS = [[method, "--one-sided-buffers", buffers] for method, buffers in EXECUTORS]


def run_scenario(rank: int, argv: list[str], drops: bool = False, directory: str | None = None) -> Any:
    """The result, what was printed, and on rank 0 the content of the file. `drops`: rank 0 drops rows."""
    printed = io.StringIO()
    with (
        ENCODINGS.added("rows", ROWS),
        ENCODINGS.added("changes", CHANGES),
        rows_dropped() if drops and rank == 0 else contextlib.nullcontext(),
        contextlib.redirect_stdout(printed),
    ):
        scenario = parse([*FLAGS, *argv]).scenario
        assert dist.group.WORLD is not None
        file = ResultFile.create(Path(directory), "run") if directory and rank == 0 else None
        result = benchmark(new_session(scenario, torch.device("cpu"), dist.group.WORLD), file)
        return result, printed.getvalue(), read_result(file.path) if file else None


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_rows_that_differ_from_zero(ranks: RankPool, way: list[str], tmp_path: Path) -> None:
    answers = ranks.run(run_scenario, [*SENT_AS_ROWS, "--refit-method", *way], False, str(tmp_path))
    result, output, stored = answers[0]
    engine = result.refit.engines["refit"]
    assert (result.exit_code, engine.status, engine.num_wrong) == (0, Status.OK, 0)
    assert engine.num_compared > 0
    assert stored.refit.engines["refit"] == engine
    assert stored.scenario.encoding == "rows"
    for sample in engine.samples:
        assert result.refit.plan.wire_bytes < sample.most_sent_bytes < 1.2 * result.refit.plan.wire_bytes
        assert 0.4 < sample.sent_bytes / sample.most_sent_bytes < 0.6
    # What was sent is less than the plan has, so nothing is set against the plan's bytes.
    assert (engine.bottleneck_gb_per_s, engine.share_of_lower_bound) == (None, None)
    assert max(engine.staging_bytes_per_rank) > 0, "messages that are decoded are staged"
    assert f"over {way[0]} with rows: " in output
    assert "refit: sent " in output


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_rows_of_codes_and_scales(ranks: RankPool, way: list[str]) -> None:
    argv = [*FP8, "--refit-encoding", "rows", "--refit-method", *way]
    result, *_ = ranks.run(run_scenario, argv)[0]
    engine, quantised = result.refit.engines["refit"], result.refit.quantised
    assert (result.exit_code, engine.status, engine.num_wrong) == (0, Status.OK, 0)
    assert min(quantised.blocks_at_source, quantised.blocks_at_destination) > 0
    assert set(engine.samples[0].phases_s) >= {"quantise", "quantise arrived"}
    assert 0.4 < engine.sent_share < 0.7


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("dtype", [[], FP8], ids=["bf16", "fp8"])
def test_rows_that_have_changed(ranks: RankPool, way: list[str], dtype: list[str]) -> None:
    """A refit builds on the one before. The oracle then leaves the destination as it is, and compares all of it."""
    argv = [*(dtype or LAYOUTS), "--refit-encoding", "changes", "--refit-method", *way]
    result, *_ = ranks.run(run_scenario, argv)[0]
    engine = result.refit.engines["refit"]
    assert (result.exit_code, engine.status, engine.num_wrong) == (0, Status.OK, 0)
    first, *later = (sample.sent_bytes / sample.most_sent_bytes for sample in engine.samples)
    assert first == 1
    assert all(share < 0.75 for share in later)


@contextmanager
def rows_dropped() -> Iterator[None]:
    """The first row of each message is left out, as if it were of zeros."""
    pack = nonzero_rows.RowEncoder.pack

    def dropping(self: Any, payload: torch.Tensor, length: torch.Tensor) -> None:
        tensor, box = self._pieces[0]
        view = nonzero_rows.assembled(self._weights, tensor.key, box)
        row = view.view(nonzero_rows.num_rows(box), -1)[0] if view.is_contiguous() else view[0]
        kept = row.clone()
        row.zero_()
        pack(self, payload, length)
        row.copy_(kept)

    with mock.patch.object(nonzero_rows.RowEncoder, "pack", dropping):
        yield


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1]], ids=" ".join)
def test_a_dropped_row_is_found(ranks: RankPool, way: list[str]) -> None:
    result, *_ = ranks.run(run_scenario, [*SENT_AS_ROWS, "--refit-method", *way], True)[0]
    engine = result.refit.engines["refit"]
    assert engine.status is Status.WRONG_DATA
    assert engine.num_wrong > 0


def test_flags_and_the_dry_run_know_it() -> None:
    with ENCODINGS.added("rows", ROWS):
        assert "rows: the rows that differ from zero" in " ".join(full_parser().format_help().split())
        scenario = parse([*FLAGS, *SENT_AS_ROWS, "--dry-run"]).scenario
        text = dry_run_text(dry_run(scenario, DryRunOptions()))
        assert "rows: the rows that differ from zero; the bytes below are" in text
        with pytest.raises(UsageError, match="--refit-engine megatron sends weights as they are, --refit-encod"):
            parse([*FLAGS, *SENT_AS_ROWS, "--refit-method", "gloo", "--refit-engine", "both"])
        with pytest.raises(UsageError, match="--refit-encoding rows needs a refit"):
            parse([*FLAGS, "--refit-encoding", "rows", "--refit-method", "gloo", "--measure", "train-step"])
    with pytest.raises(UsageError, match="--refit-encoding"):
        parse([*FLAGS, *SENT_AS_ROWS, "--refit-method", "gloo"])
    with pytest.raises(UsageError, match="--refit-encoding"):  # it follows from the dtype
        parse([*FLAGS, *LAYOUTS, "--refit-encoding", "fp8", "--refit-method", "gloo"])
