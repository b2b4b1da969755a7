"""Adding a transport, a side's format, an engine or a measurement: one file and one row, nothing else."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples.plugin import QUEUE
from refit.bench.runner import benchmark
from refit.bench.session import new_session
from refit.cli.flags import full_parser
from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.registry import ENGINES, FORMATS, MEASUREMENTS, METHODS
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.results.refit import speed_ratio
from refit.results.result import ResultFile, read_result
from refit.results.status import Status
from tests.ranks.pool import RankPool
from tests.seams.plain import PLAIN
from tests.seams.small_parts import COUNT, ENGINE_PARTS, LEFT_OUT, CountResult

FLAGS = ["--model", "tiny", "--num-layers", "2", "--moe-layer-freq", "([0]*1+[1]*1)", "--vocab-size", "500"]
FLAGS += ["--hidden-size", "64", "--ffn-hidden-size", "128", "--moe-ffn-hidden-size", "32", "--num-query-groups", "8"]
FLAGS += ["--moe-shared-expert-intermediate-size", "32", "--num-benchmark-warmup", "1"]
FLAGS += ["--num-benchmark-iterations", "2"]
LAYOUTS = ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
LAYOUTS += ["--rl-inference-tensor-model-parallel-size", "4", "--rl-inference-expert-model-parallel-size", "1"]


@contextlib.contextmanager
def registered() -> Any:
    with contextlib.ExitStack() as stack:
        for table, name, row in (
            (METHODS, "queue", QUEUE),
            (FORMATS, "plain", PLAIN),
            *((ENGINES, name, row) for name, row in ENGINE_PARTS.items()),
            (MEASUREMENTS, "count", COUNT),
        ):
            stack.enter_context(table.added(name, row))  # type: ignore[attr-defined]
        yield


def run_scenario(rank: int, argv: list[str], changes: dict[str, Any], directory: str | None = None) -> Any:
    """The result, and on rank 0 also the content of its file and the output."""
    printed = io.StringIO()
    with registered(), contextlib.redirect_stdout(printed):
        scenario = replace(parse([*FLAGS, *argv]).scenario, **changes)
        assert dist.group.WORLD is not None
        file = ResultFile.create(Path(directory), "run") if directory and rank == 0 else None
        result = benchmark(new_session(scenario, torch.device("cpu"), dist.group.WORLD), file)
        return result, read_result(file.path) if file else None, printed.getvalue()


def test_a_transport_over_a_queue(ranks: RankPool) -> None:
    result, *_ = ranks.run(run_scenario, [*LAYOUTS, "--refit-method", "queue"], {})[0]
    assert (result.exit_code, result.refit.engines["refit"].num_wrong) == (0, 0)
    assert result.refit.engines["refit"].num_compared > 0


def test_a_side_of_plain_tensors_at_either_end(ranks: RankPool) -> None:
    plain = SideSpec(Layout(1, 1, 1, 1, world_size=2), format="plain")
    sharded = SideSpec(Layout(2, 2, 2, 1, world_size=4, first_rank=2))
    for source, destination in ((plain, sharded), (moved(sharded, 0), moved(plain, 4))):
        changes = {"source": source, "destination": destination}
        result, *_ = ranks.run(run_scenario, ["--refit-method", "gloo", "--check-forward"], changes)[0]
        engine = result.refit.engines["refit"]
        assert (result.exit_code, engine.num_wrong) == (0, 0)
        assert engine.forward.skipped == "plain tensors have no forward pass"


def moved(side: SideSpec, first_rank: int) -> SideSpec:
    return replace(side, layout=replace(side.layout, first_rank=first_rank))


def test_an_engine_beside_ours(ranks: RankPool) -> None:
    flags = [*LAYOUTS, "--refit-method", "gloo", "--refit-engine", "refit,gathering"]
    result, _, output = ranks.run(run_scenario, flags, {})[0]
    assert [(name, engine.status) for name, engine in result.refit.engines.items()] == [
        ("refit", Status.OK),
        ("gathering", Status.OK),
    ]
    assert set(result.refit.baselines) == {"gathering"}
    assert "# note: the gathering engine is slow" in output
    assert "x as fast as gathering's own" in output
    assert "gloo against gathering's gathers" in output


def test_an_engine_that_leaves_tensors_out_is_partial(ranks: RankPool, tmp_path: Path) -> None:
    flags = [*LAYOUTS, "--refit-method", "gloo", "--refit-engine", "refit,partial,gathering", "--check-forward"]
    result, stored, output = ranks.run(run_scenario, flags, {}, str(tmp_path))[0]
    whole, partial = (result.refit.engines[name] for name in ("gathering", "partial"))
    (left_out,) = partial.not_moved
    assert (left_out.reason, left_out.num_tensors) == ("embeddings stay", 1)
    assert LEFT_OUT in left_out.first_keys[0]
    assert partial.num_compared == whole.num_compared - left_out.num_elements * len(partial.samples)
    assert left_out.nbytes == 2 * left_out.num_elements
    assert (result.exit_code, partial.status, partial.num_wrong, partial.doubt) == (0, Status.OK, 0, "partial")
    assert (partial.bottleneck_gb_per_s, speed_ratio(result.refit.tested, partial)) == (None, None)
    assert partial.forward.skipped == "1 tensors were not moved"
    assert (whole.doubt, whole.not_moved) == (None, ())
    assert stored.refit.engines["partial"] == partial
    assert "by partial engine: PARTIAL: moved" in output
    assert "partial engine: not moved: 1 tensors" in output
    assert "Ratio: none: partial engine is partial" in output
    assert "x as fast as gathering's own" in output
    assert "gloo against gathering's gathers" in output
    assert "0 wrong; 1 tensors not moved" in output


def test_a_baseline_that_fails_in_a_refit_is_recorded_and_the_next_one_runs(ranks: RankPool) -> None:
    flags = [*LAYOUTS, "--refit-method", "gloo", "--refit-engine", "refit,failing,gathering"]
    result, _, output = ranks.run(run_scenario, flags, {})[0]
    failing = result.refit.engines["failing"]
    assert (failing.status, failing.reason, len(failing.samples)) == (Status.FAILED, "the engine broke", 1)
    assert result.refit.engines["gathering"].status is Status.OK
    assert result.exit_code == 0
    assert "FAILED (failing engine): the engine broke" in output


def test_a_measurement_that_counts(ranks: RankPool, tmp_path: Path) -> None:
    changes = {"measurements": ("count", "refit")}
    with registered():
        answers = ranks.run(run_scenario, [*LAYOUTS, "--refit-method", "gloo"], changes, str(tmp_path))
    result, stored, output = answers[0]
    assert isinstance(result.measurements["count"], CountResult)
    assert (result.exit_code, result.refit.engines["refit"].num_wrong) == (0, 0)
    assert stored.measurements["count"] == result.measurements["count"]
    assert f"COUNTED {sum(result.measurements['count'].elements_per_rank):,} elements on 8" in output


def test_flags_and_the_dry_run_know_what_is_registered() -> None:
    with registered():
        assert "queue needs the ranks' store" in full_parser().format_help().replace("\n", " ").replace("  ", "")
        scenario = parse([*FLAGS, *LAYOUTS, "--refit-method", "queue", "--dry-run"]).scenario
        plain = replace(scenario, source=SideSpec(Layout(1, 1, 1, 1, world_size=4), format="plain"))
        assert dry_run(plain, DryRunOptions()).source_bytes[0] == dry_run(plain, DryRunOptions()).source_bytes[3]
        with pytest.raises(UsageError, match="moves weights on cpu only"):
            parse([*FLAGS, *LAYOUTS, "--refit-method", "queue", "--device", "cuda"])
    with pytest.raises(UsageError, match="--refit-method"):
        parse([*FLAGS, *LAYOUTS, "--refit-method", "queue"])
