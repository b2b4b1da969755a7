"""Pictures of a run: which files there are, what they show, and what happens without matplotlib."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from refit import commands
from refit.cli.parsing import parse
from refit.errors import UnavailableError
from refit.plan.cost import Cost, cost_of
from refit.plan.planner import plan_refit
from refit.predict.sides import predict_side
from refit.report import plots
from refit.report.plots.pairs import NoPairs
from refit.report.refits.page import Pictures, page
from refit.results.outcomes import Outcome, judged
from refit.results.result import Failure, Result
from refit.results.runs import find_run
from refit.results.status import Status
from refit.results.sweep import Planned
from refit.sweep.pairs import pair_bytes
from tests.report.factories import planned, result, side, sweep_of, timed, write_run

FLAGS = (
    "--model tiny --tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--rl-inference-tensor-model-parallel-size 1 --refit-method gloo --refit-mode"
)


PAIRS = partial(pair_bytes, gpus_per_node=8)


def really_planned(name: str, mode: str, ranks_per_node: int | None = None) -> tuple[Planned, Cost]:
    """A scenario of the tiny model, and the cost of its plan for these nodes."""
    flags = (*FLAGS.split(), mode)
    scenario = parse(flags).scenario
    assert scenario.model is not None
    source, destination = (predict_side(scenario.model, side) for side in scenario.sides.values())
    plan = plan_refit(source, destination, ranks_per_node=ranks_per_node)
    return planned(name, side(2, 2), side(1, 2), mode, "gloo", flags=flags), cost_of(plan)


def of(entry: Planned, content: Result) -> Outcome:
    return judged(entry, content)


@pytest.mark.parametrize("mode", ["collocated", "non-collocated"])
@pytest.mark.parametrize("ranks_per_node", [None, 2])
def test_pairs_add_up_to_what_the_run_recorded(mode: str, ranks_per_node: int | None) -> None:
    entry, plan = really_planned("a", mode, ranks_per_node)
    matrix = pair_bytes(of(entry, result(entry, plan=plan)), ranks_per_node or 8)
    assert {rank: int(matrix[rank, rank]) for rank in plan.local_by_rank} == plan.local_by_rank
    np.fill_diagonal(matrix, 0)
    assert {rank: int(matrix[rank].sum()) for rank in plan.sent_by_rank} == plan.sent_by_rank
    assert matrix.sum() == plan.wire_bytes


def test_a_plan_that_cannot_be_made_again_is_not_drawn() -> None:
    entry, plan = really_planned("a", "collocated")
    with pytest.raises(NoPairs, match="differs from the plan that ran"):
        pair_bytes(of(entry, result(entry, plan=replace(plan, digest="other"))), 8)
    provider = planned("b", flags=("--model-provider", "own:model", "--refit-method", "gloo"))
    with pytest.raises(NoPairs, match="model-provider"):
        pair_bytes(of(provider, result(provider)), 8)
    unknown = planned("c", flags=("--no-such-flag",))
    with pytest.raises(NoPairs, match="unknown flag"):
        pair_bytes(of(unknown, result(unknown)), 8)


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    entry, plan = really_planned("a", "collocated")
    run = find_run(write_run(tmp_path, sweep_of([entry]), {"a": result(entry, plan=plan)}))
    with pytest.raises(UnavailableError, match="pip install") as caught:
        list(plots.draw(run, tmp_path / "pictures", PAIRS))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "pictures").exists()


def test_every_picture_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entry, plan = really_planned("drawn", "collocated")
    failed, other = planned("failed"), planned("other", flags=("--no-such-flag",))
    results = {
        "drawn": result(entry, plan=plan, bound_s=0.01, baseline=timed([0.2, 0.3])),
        "failed": result(failed, status=Status.FAILED, measurements={}, failure=Failure("killed")),
        "other": result(other),
    }
    run = find_run(write_run(tmp_path, sweep_of([entry, failed, other]), results))
    drawn = list(plots.draw(run, tmp_path / "pictures", PAIRS))
    paths = [path for path in drawn if isinstance(path, Path)]
    names = ["times", "iterations", "phases", "scaling", "drawn_bytes", "drawn_pairs", "other_bytes"]
    assert [path.stem for path in paths] == names
    assert {path.suffix for path in paths} == {".png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [line for line in drawn if isinstance(line, str)] == [
        "failed: no bytes: killed",
        "other: no bytes between pairs of ranks: its flags cannot be planned: unknown flag --no-such-flag: "
        "no known flag is close to it, --help lists them",
    ]


def test_runs_of_one_scenario_have_one_picture_of_its_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entry, plan = really_planned("twice", "collocated")
    runs = [replace(entry, name=f"twice_run{number}", run_of="twice") for number in (1, 2)]
    failed = result(runs[0], status=Status.FAILED, measurements={}, failure=Failure("killed"))
    results = {runs[0].name: failed, runs[1].name: result(runs[1], plan=plan)}
    run = find_run(write_run(tmp_path, sweep_of(runs), results))
    drawn = plots.draw(run, tmp_path / "pictures", PAIRS)
    own = [path for path in drawn if isinstance(path, Path) and path.stem.startswith("twice")]
    assert [path.stem for path in own] == ["twice_bytes", "twice_pairs"]
    assert page([run], [Pictures(tuple(own))]).count('<div class="small">\n<figure>') == 1


def test_a_run_without_times_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entry = planned("never")
    run = find_run(write_run(tmp_path, sweep_of([entry]), {}))
    assert list(plots.draw(run, tmp_path / "pictures", PAIRS)) == [
        "no times: no scenario of this run has any",
        "never: no bytes: it was not started",
    ]


def test_a_comparison_is_drawn_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    entry = planned("a")
    runs = [
        str(write_run(tmp_path / name, sweep_of([entry]), {"a": result(entry, [seconds] * 5)}))
        for name, seconds in (("old", 0.1), ("new", 0.2))
    ]
    picture = tmp_path / "pictures" / "changes.png"
    assert commands.main(["compare", *runs, "--plot", str(picture)]) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Picture: {picture}" in capsys.readouterr().out
    assert commands.main(["compare", *runs, "--plot", str(tmp_path / "old")]) == 2
    assert "give another file" in capsys.readouterr().err
