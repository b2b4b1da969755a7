"""A comparison of two runs: both medians of every scenario, with the spread of their refits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refit.report.plots.caption import caption
from refit.report.plots.style import (
    DOUBTFUL,
    METHOD_LOOKS,
    check_available,
    grid,
    legend,
    new_figure,
    save,
    time_scale,
    wrapped,
    wrapped_text,
)
from refit.report.refits.compare import Comparison, Pair
from refit.report.refits.run_spread import MIN_SAMPLES, Repeated, half_width
from refit.report.terminal.escaped import picture_text
from refit.results.runs import Run
from refit.results.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OLD, NEW = METHOD_LOOKS[3], METHOD_LOOKS[0]


def draw_changes(old: Run, new: Run, comparison: Comparison, path: Path) -> Path:
    """Write the picture of a comparison to `path`. Raises UnavailableError without matplotlib, OSError."""
    check_available()
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(changes_figure(old, new, comparison), path)


def changes_figure(old: Run, new: Run, comparison: Comparison) -> Figure:
    """Medians of both, whiskers their intervals (median +- `half_width`), the change beside them."""
    pairs = comparison.pairs
    runs = [
        f"{word}: {picture_text(run.sweep.run_id)} ({caption([one for each in both for one in each.outcomes])})"
        for word, run, both in (
            ("old", old, [pair.old for pair in pairs]),
            ("new", new, [pair.new for pair in pairs]),
        )
    ]
    figure = new_figure(10, 2.4 + 0.85 * len(pairs), "Refit time, old and new", "")
    figure.suptitle("\n".join(["Refit time, old and new", *(wrapped_text(run, 130) for run in runs)]), fontsize=10)
    axes = figure.add_subplot()
    longest_s = max((_end_s(one) for pair in pairs for one in (pair.old, pair.new)), default=0.0)
    scale, unit = time_scale(longest_s)
    for row, pair in enumerate(pairs):
        for offset, scenario, name in ((-0.2, pair.old, "old"), (0.2, pair.new, "new")):
            _bar(axes, scenario, row + offset, scale, name)
        end = scale * max(_end_s(pair.old), _end_s(pair.new))
        axes.annotate(change_text(pair), (end, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(pairs)), [_title(pair) for pair in pairs], fontsize=9)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, 1.45 * scale * longest_s or 1.0)
    several = any(scenario.has_runs for pair in pairs for scenario in (pair.old, pair.new))
    farthest = ", or the distance of the farthest run" if several else ""
    axes.set_xlabel(
        f"refit time ({unit}): median of the slowest rank; whiskers: median +- 1.57 x IQR / sqrt(n){farthest}"
    )
    grid(axes, "x")
    legend(figure)
    return figure


def _title(pair: Pair) -> str:
    return f"{wrapped(pair.name)}\nover {picture_text(pair.methods)}"


def change_text(pair: Pair) -> str:
    """`+10.0 %, within spread`; the status and reason where the new result is not valid."""
    for word, outcome in (("new", pair.new.first), ("old", pair.old.first)):
        if outcome.status is not Status.OK:
            return wrapped_text(f"{word}: {outcome.status.text}: {outcome.reason}", 40)
    if pair.change is None:
        return "no times"
    spread = {True: ", beyond spread", False: ", within spread", None: ""}[pair.is_beyond_spread]
    other = f" ({pair.methods})" if pair.old.methods != pair.new.methods else ""
    return wrapped_text(f"{100 * pair.change:+.1f} %{spread}{other}", 60)


def _half_s(scenario: Repeated) -> float:
    runs = scenario.samples_s
    return half_width(runs) if runs and min(map(len, runs)) >= MIN_SAMPLES else 0.0


def _end_s(scenario: Repeated) -> float:
    return scenario.median_s + _half_s(scenario) if scenario.median_s else 0.0


def _bar(axes: Axes, scenario: Repeated, place: float, scale: float, name: str) -> None:
    if not scenario.median_s:
        return
    is_valid = scenario.first.status is Status.OK
    look, label = ((OLD, NEW)[name == "new"], name) if is_valid else (DOUBTFUL, "not valid")
    median, half = scale * scenario.median_s, scale * _half_s(scenario)
    axes.barh(place, median, height=0.38, xerr=half or None, capsize=3, label=label, **look.fill)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.annotate(
        f"{median:.3g}", (0, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, bbox=box
    )
