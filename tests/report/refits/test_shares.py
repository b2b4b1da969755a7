"""Times and bytes against the share of changed weights, and where changes take as long as everything."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from refit.config.delta import DeltaOptions
from refit.report.plots.shares import shares_figure
from refit.report.refits.analysis import analyse
from refit.report.refits.shares import Curve, Point, curves_of
from refit.results.outcomes import Outcome, judged
from refit.results.refit import EngineResult
from refit.results.result import Result
from tests.report.factories import planned, result, side
from tests.report.refits.test_delta_lines import FULL, TWO_SHARES, WIRE, changes, engine


def outcome_of(name: str, ours: EngineResult, shares: tuple[float, ...]) -> Outcome:
    entry = planned(name, side(2, 2), side(2, 1))
    found: Result = result(entry, payload=WIRE, engines={"refit": ours, "full": FULL})
    assert found.scenario is not None
    scenario = replace(found.scenario, encoding="delta", delta=DeltaOptions(shares))
    return judged(entry, replace(found, scenario=scenario))


def at(share: float, seconds: float) -> Outcome:
    samples = (changes(0, 0.5, None), *(changes(number, seconds, share) for number in (1, 2, 3)))
    return outcome_of(f"at_{share}", engine(*samples), (share,))


def test_shares_of_one_run_are_a_curve_with_its_crossover() -> None:
    (curve,) = curves_of([outcome_of("both", TWO_SHARES, (0.01, 0.5))])
    assert [(point.share, point.median_s) for point in curve.points] == [(0.01, 0.011), (0.5, 0.4)]
    assert curve.full_s == 0.34
    assert curve.crossover is not None
    part = math.log(0.34 / 0.011) / math.log(0.4 / 0.011)
    assert curve.crossover == pytest.approx(0.01 ** (1 - part) * 0.5**part)
    assert curve.verdict.startswith("as fast as full at 4")


def test_shares_of_several_scenarios_are_one_curve_in_order() -> None:
    (curve,) = curves_of([at(0.2, 0.2), at(0.001, 0.01), at(0.05, 0.05)])
    assert [point.share for point in curve.points] == [0.001, 0.05, 0.2]
    assert curve.crossover is None
    assert curve.verdict == "faster than full at every share measured"


def test_the_analysis_says_up_to_which_share_changes_are_faster() -> None:
    *_, finding = analyse([at(0.001, 0.01), at(0.5, 0.6)])
    assert finding.question == "Deltas: up to which share of changed weights is sending them faster?"
    assert finding.answer[0].startswith("TP2 EP2 -> TP2 EP1 non-collocated over nvshmem, uniform: as fast as full at")


def test_one_share_is_no_curve() -> None:
    assert curves_of([at(0.2, 0.2)]) == []


def test_without_full_refits_nothing_is_compared() -> None:
    curve = Curve("a", (Point(0.01, 1.0, None), Point(0.1, 2.0, None)), None)
    assert (curve.crossover, curve.verdict) == (None, "no full refits to compare with")
    noisy = Curve("a", tuple(Point(10.0**-n, seconds, None) for n, seconds in ((3, 3.0), (2, 1.0), (1, 4.0))), 2.0)
    assert noisy.crossover == pytest.approx(10**-1.5)
    slow = replace(curve, full_s=0.5)
    assert slow.verdict == "slower than full at every share measured"


def test_the_picture_has_both_panels(tmp_path: Path) -> None:
    figure = shares_figure(curves_of([at(0.01, 0.1), at(0.5, 0.6)]), "2 cores")
    times, sizes = figure.axes
    assert [line.get_ydata()[0] for line in times.lines if line.get_label() == "full refit"] == [340.0]
    assert any(line.get_label() == "crossover" for line in times.lines)
    assert list(sizes.lines[0].get_xdata()) == [1.0, 50.0]
    assert list(sizes.lines[0].get_ydata()) == pytest.approx([2.1, 105.0])
    figure.savefig(tmp_path / "shares.png")
