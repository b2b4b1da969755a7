"""What each picture shows, read from its matplotlib objects."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refit.config.layout import Layout
from refit.report.plots.caption import caption
from refit.report.plots.changes import changes_figure
from refit.report.plots.iterations import iterations_figure
from refit.report.plots.nodes import expert_groups
from refit.report.plots.pairs import pairs_figure
from refit.report.plots.phases import median_sample, phases_figure
from refit.report.plots.rank_bytes import rank_bytes_figure
from refit.report.plots.scaling import scaling_figure
from refit.report.plots.style import BASELINE_LOOKS, DOUBTFUL, METHOD_LOOKS, PHASE_LOOKS, Look, method_look
from refit.report.plots.times import times_figure
from refit.report.refits.compare import compare_runs
from refit.report.refits.points import points_of
from refit.report.refits.scaling import scalings
from refit.results.outcomes import Outcome, judged
from refit.results.refit import EngineResult
from refit.results.result import Failure, Gpu, Result
from refit.results.runs import Run
from refit.results.status import Status
from refit.results.sweep import Planned
from tests.report.factories import ENVIRONMENT, cost, engine, planned, result, side, sweep_of, timed

pytest.importorskip("matplotlib")


def outcome(name: str, samples_s: list[float] | None = None, **changes: Any) -> Outcome:
    entry = planned(name)
    return judged(entry, result(entry, samples_s or [0.2, 0.25, 0.3], **changes))


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def lightness(look: Look) -> float:
    """Of a fill in grey, 0 to 1 (ITU-R BT.601 luma)."""
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(look.color), (0.299, 0.587, 0.114)))


@pytest.mark.parametrize("looks", [METHOD_LOOKS, BASELINE_LOOKS, PHASE_LOOKS])
def test_fills_can_be_told_apart_in_grey(looks: tuple[Look, ...]) -> None:
    for one in looks:
        others = [other for other in (*looks, DOUBTFUL) if other is not one]
        assert all(one.hatch != other.hatch or abs(lightness(one) - lightness(other)) > 0.2 for other in others)


def test_times_have_a_bar_for_each_engine_with_its_median_and_bound() -> None:
    ok = outcome(
        "ok",
        [1.9, 2.0, 2.5],
        bound_s=1.5,
        engines={"refit": timed([1.9, 2.0, 2.5]), "megatron": timed([4.0]), "other": timed([3.0])},
    )
    (axes,) = times_figure([ok], "4 x H200, kimi_k2").axes
    assert sorted(bar.get_width() for bar in axes.patches) == [2.0, 3.0, 4.0]
    assert len({bar.get_hatch() for bar in axes.patches}) == 3
    assert {tuple(line.get_xdata()) for line in axes.lines if line.get_label() == "lower bound"} == {(1.5, 1.5)}
    assert {"2", "3", "4", "75 % of the bound"} <= set(texts(axes))
    assert axes.get_xlabel().startswith("refit time (s)")
    assert axes.figure.get_suptitle() == "Refit time and lower bound\n4 x H200, kimi_k2"
    assert {"Megatron-Core over nvshmem (baseline)", "other over nvshmem (baseline)", "refit over nvshmem"} <= set(
        axes.get_legend_handles_labels()[1]
    )


def test_the_axis_of_times_ends_where_bars_and_text_do() -> None:
    short = outcome("short", [0.010] * 3, engines={"refit": timed([0.010] * 3, num_wrong=3)})
    (axes,) = times_figure([outcome("long", [0.125] * 3), short], "").axes
    assert 125 < axes.get_xlim()[1] < 140
    (axes,) = times_figure([outcome("long", [0.125] * 3, bound_s=0.1), short], "").axes
    assert 145 < axes.get_xlim()[1] < 165, "room for the share of the bound"


@pytest.mark.parametrize("looks", [METHOD_LOOKS, BASELINE_LOOKS])
def test_a_measured_refits_marker_is_not_taken_for_a_hollow_one(looks: tuple[Look, ...]) -> None:
    assert all(lightness(replace(one, color=one.marker_color)) < 0.55 for one in looks)


def test_times_promise_no_bound_where_there_is_none() -> None:
    figure = times_figure([outcome("ok")], "")
    assert figure.get_suptitle() == "Refit time"
    assert "lower bound" not in figure.axes[0].get_legend_handles_labels()[1]


def test_times_show_why_a_scenario_or_a_baseline_has_none() -> None:
    failed = outcome("bad", status=Status.FAILED, engines={}, failure=Failure("killed by the kernel"))
    waived = outcome("ok", baseline=EngineResult(Status.WAIVED, "needs NCCL 2.30"))
    (axes,) = times_figure([failed, waived], "").axes
    assert {"failed: killed by the kernel", "Megatron-Core over nvshmem: waived: needs NCCL 2.30"} <= set(texts(axes))


def test_times_hatch_and_name_a_wrong_baseline() -> None:
    (axes,) = times_figure([outcome("ok", [2.0], baseline=timed([4.0], num_wrong=3))], "").axes
    assert {bar.get_width(): bar.get_hatch() for bar in axes.patches} == {
        2.0: method_look("nvshmem").hatch,
        4.0: DOUBTFUL.hatch,
    }
    assert "Megatron-Core over nvshmem: wrong" in texts(axes)
    assert "not valid" in axes.get_legend_handles_labels()[1]


def test_names_are_drawn_as_they_are() -> None:
    figure = times_figure([outcome("$\\frac\x1b[2J")], caption([], sweep_of([])))
    figure.savefig(io.BytesIO())
    assert figure.axes[0].get_yticklabels()[0].get_text() == "\\$\\frac\\x1b[2J"


def test_a_long_name_goes_on_in_the_next_line() -> None:
    (axes,) = times_figure([outcome("x" * 100)], "").axes
    assert axes.get_yticklabels()[0].get_text().count("\n") == 2


def test_a_name_is_broken_after_an_underscore() -> None:
    (axes,) = times_figure([outcome("a" * 30 + "_" + "b" * 30)], "").axes
    assert axes.get_yticklabels()[0].get_text() == "a" * 30 + "_\n" + "b" * 30


def test_one_slow_refit_does_not_stretch_the_axis() -> None:
    (axes,) = times_figure([outcome("ok", [0.1, 0.1, 9.0])], "").axes
    assert axes.get_xlim()[1] < 200
    assert texts(axes) == ["100", "slowest 9,000"]


def test_the_caption_names_hardware_model_and_date() -> None:
    assert caption([outcome("ok")]) == "12 hosts of 8 x NVIDIA H100 80GB HBM3, kimi_k2, 2026-01-26"
    on_cpu = outcome("cpu", device="cpu", environment=replace(ENVIRONMENT, gpus=(), cpu="AMD EPYC", num_cpus=2))
    assert "CPU: 2 cores of AMD EPYC" in caption([on_cpu])
    one_host = replace(on_cpu, planned=replace(on_cpu.planned, nodes=1))
    assert caption([one_host, outcome("ok")]).startswith("up to 12 hosts of CPU: 2 cores of AMD EPYC / 8 x NVIDIA")
    others = [outcome(str(n), environment=replace(ENVIRONMENT, gpus=(Gpu(f"GPU{n}"),))) for n in range(3)]
    assert "3 machines" in caption(others)
    assert caption([], sweep_of([])) == "Kimi K2, 2026-01-26"


def test_every_engine_has_its_refits_and_their_median() -> None:
    one = outcome("ok", engines={"refit": timed([0.1, 0.2]), "megatron": timed([0.3]), "other": timed([0.4, 0.5])})
    (axes,) = iterations_figure([one], "").axes
    measured = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert measured == {
        "refit over nvshmem": pytest.approx([100, 200]),
        "Megatron-Core over nvshmem": pytest.approx([300]),
        "other over nvshmem": pytest.approx([400, 500]),
    }
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([150, 300, 450])


def test_the_phases_of_the_median_refit_add_up_to_it() -> None:
    run = engine([[0.1], [0.4], [0.2]])
    assert median_sample(run).seconds == 0.2
    one = outcome("ok", engines={"refit": replace(run, connect_s=1.0)})
    left, right = phases_figure([one], "").axes
    assert sum(bar.get_width() for bar in left.patches) == pytest.approx(
        150
    )  # its phases: three quarters, all on the wire
    assert [bar.get_width() for bar in right.patches] == [1.0, 0.125, 0.25, 0.5]
    assert right.get_legend_handles_labels()[1] == ["connections", "plan", "prepare", "first refit"]


def scaling_outcomes(times_s: tuple[float, ...]) -> list[Outcome]:
    sizes = (60_000_000_000, 120_000_000_000, 600_000_000_000)
    return [
        outcome(f"n{size}", [time_s] * 3, busiest=size, num_transfers=transfers)
        for size, time_s, transfers in zip(sizes, times_s, (64_000, 32_000, 640_000), strict=True)
    ]


def test_time_against_bytes_shows_the_fit() -> None:
    groups = scalings(points_of(scaling_outcomes((0.8, 1.3, 8.0))))
    (axes,) = scaling_figure(groups, "").axes
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == pytest.approx([0.8, 1.3, 8.0])
    assert "100.0 GB/s" in axes.get_legend_handles_labels()[1][0]


def test_time_against_bytes_says_why_there_is_no_fit() -> None:
    groups = scalings(points_of(scaling_outcomes((0.8, 1.3, 8.0))[:2]))
    (axes,) = scaling_figure(groups, "").axes
    assert not [line for line in axes.lines if line.get_linestyle() == "--"]
    assert "no conclusion: 2 scenarios" in axes.get_legend_handles_labels()[1][0]


def test_sent_and_received_bytes_are_drawn_apart() -> None:
    plan = cost(sent={0: 4_000_000, 1: 0}, received={2: 3_000_000, 3: 1_000_000})
    (axes,) = rank_bytes_figure(outcome("name"), plan, None, "").axes
    bars = {(round(bar.get_x() + 0.4), bar.get_height()) for bar in axes.patches if bar.get_height()}
    assert bars == {(2, 3), (3, 1), (0, -4)}
    assert "(MB)" in axes.get_ylabel()


def test_bytes_are_divided_within_and_between_nodes() -> None:
    one = outcome("name")
    matrix = np.zeros((10, 10), np.int64)
    matrix[0, 1], matrix[0, 9], matrix[0, 0] = 2_000_000, 5_000_000, 99_000_000
    plan = cost(sent={0: 7_000_000}, received={1: 2_000_000, 9: 5_000_000})
    (axes,) = rank_bytes_figure(one, plan, matrix, "").axes
    bars = {(round(bar.get_x() + 0.4), bar.get_y(), bar.get_height()) for bar in axes.patches if bar.get_height()}
    assert bars == {(1, 0, 2), (0, 0, -2), (9, 0, 5), (0, -2, -5)}
    labels = axes.get_legend_handles_labels()[1]
    assert {"within a node", "between nodes", "node boundary"} <= set(labels)
    assert 7.5 in {line.get_xdata()[0] for line in axes.lines}


def test_the_heat_map_has_source_ranks_in_rows() -> None:
    entry = planned("name", side(2, 1), side(1, 1))
    matrix = np.zeros((3, 3), np.int64)
    matrix[1, 2] = 5_000_000_000
    axes, bar = pairs_figure(judged(entry, result(entry)), matrix, "").axes
    shown = axes.images[0].get_array()
    assert shown.shape == (2, 1)
    assert shown.mask.tolist() == [[True], [False]]
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("5.00", (2, 1))]
    assert "GB" in bar.get_ylabel()


def test_the_heat_map_names_groups_and_divides_nodes() -> None:
    entry = planned("name", side(2, 8), side(1, 1), ranks_per_node=8)
    axes = pairs_figure(judged(entry, result(entry)), np.ones((17, 17), np.int64), "").axes[0]
    assert [text for text in texts(axes) if text.startswith("EP")] == [f"EP{index}" for index in range(8)]
    thick = [line.get_ydata()[0] for line in axes.lines if line.get_linewidth() > 2 and line.get_color() == "black"]
    assert thick == [7.5]
    assert "nodes" in axes.get_xlabel()


def test_groups_hold_the_same_experts() -> None:
    assert expert_groups(Layout(2, 1, 2, 1, 2)) == {}
    assert expert_groups(Layout(2, 2, 2, 1, 4, first_rank=4)) == {"EP0": range(4, 6), "EP1": range(6, 8)}
    assert list(expert_groups(Layout(1, 2, 1, 2, 4))) == ["PP0 EP0", "PP0 EP1", "PP1 EP0", "PP1 EP1"]
    assert list(expert_groups(Layout(4, 2, 1, 1, 4))) == ["EDP0 EP0", "EDP0 EP1", "EDP1 EP0", "EDP1 EP1"]


def run_of(*outcomes: Outcome) -> Run:
    entries: list[Planned] = [one.planned for one in outcomes]
    return Run(directory=Path(), sweep=sweep_of(entries), outcomes=outcomes, is_sweep=True)


def test_a_comparison_shows_both_medians_and_the_change() -> None:
    old = run_of(outcome("a", [0.1] * 5), outcome("b", [0.2] * 5), outcome("c"))
    killed: Result = result(planned("c"), status=Status.FAILED, measurements={}, failure=Failure("killed"))
    new = run_of(outcome("a", [0.11] * 5), outcome("b", [0.2] * 5), judged(planned("c"), killed))
    figure = changes_figure(old, new, compare_runs(old, new))
    shown = texts(figure.axes[0])
    assert {"+10.0 %, beyond spread", "+0.0 %, within spread", "new: failed: killed", "100", "110"} <= set(shown)
    assert "NVIDIA H100" in figure.get_suptitle()


def test_a_comparison_of_several_runs_shows_how_far_they_are_apart() -> None:
    """Refits of a run are equal, so that the whisker is the distance of the farthest run."""
    runs = [
        replace(outcome(f"a_run{number}", [seconds] * 5), planned=planned(f"a_run{number}", run_of="a"))
        for number, seconds in enumerate((0.1, 0.13, 0.11), start=1)
    ]
    figure = changes_figure(run_of(*runs), run_of(*runs), compare_runs(run_of(*runs), run_of(*runs)))
    (axes,) = figure.axes
    whiskers = [path.vertices[:, 0] for lines in axes.collections for path in lines.get_paths()]
    assert [ends.tolist() for ends in whiskers] == [pytest.approx([90, 130])] * 2
    assert "+0.0 %, within spread" in texts(axes)
    assert "the farthest run" in axes.get_xlabel()
