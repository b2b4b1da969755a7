"""Refit times of a run, one group of bars per scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refit.report.plots.style import (
    DOUBTFUL,
    Look,
    baseline_look,
    grid,
    legend,
    method_look,
    new_figure,
    ran_title,
    tested_title,
    time_scale,
    wrapped,
    wrapped_text,
)
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult
from refit.results.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOUND = "black"
TEXT_WIDTH = 44
"""Characters of a line beside a bar."""

CHARACTER = 0.0085
"""Width of a character of the text beside a bar, as a share of the axis."""

MARGIN = 0.03
"""What is left free at the end of the axis, as a share of it."""

MAX_WHISKER = 1.3
"""Whiskers end at this multiple of the longest median or bound; beyond it the slowest refit is written beside them."""

INSIDE_SHARE = 0.055
"""A bar of at least this share of the axis holds its median; beside a shorter one it comes first."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One engine's times in seconds, or why there are none. `text` is what stands beside it."""

    label: str
    look: Look
    median_s: float | None = None
    min_s: float = 0.0
    max_s: float = 0.0
    bound_s: float | None = None
    text: str = ""

    @property
    def length_s(self) -> float:
        """Where bar and bound end."""
        return max(self.median_s or 0.0, self.bound_s or 0.0)


def bars_of(outcome: Outcome) -> list[Bar]:
    """The bar of the engine under test, then one for each baseline."""
    return [tested_bar(outcome), *(baseline_bar(outcome, name) for name in outcome.refit.baselines)]


def tested_bar(outcome: Outcome) -> Bar:
    """The times of the engine under test, with its share of the bound, or why they are no result."""
    share, bound = outcome.share_of_bound, outcome.bound
    parts = [f"{100 * share:.0f} % of the bound"] if share else []
    is_valid = outcome.status is Status.OK
    parts += [] if is_valid else [f"{outcome.status.text}: {outcome.reason}" if outcome.reason else outcome.status.text]
    bound_s = bound.seconds if bound and bound.seconds and outcome.median_s else None
    look = method_look(outcome.method)
    return _bar(outcome.tested, tested_title(outcome), look, ", ".join(parts), is_valid=is_valid, bound_s=bound_s)


def baseline_bar(outcome: Outcome, name: str) -> Bar:
    """The times of the baseline called `name`, marked where they are no result."""
    engine, title = outcome.refit.baselines[name], ran_title(outcome, name)
    reason = f": {engine.reason}" if engine.reason and engine.median_s is None else ""
    text = f"{engine.doubt.lower()}{reason}" if engine.doubt else ""
    if engine.median_s is None or engine.doubt:
        text = f"{title}: {text or 'no times'}"
    return _bar(engine, f"{title} (baseline)", baseline_look(name), text, is_valid=not engine.doubt)


def _bar(
    engine: EngineResult | None, label: str, look: Look, text: str, *, is_valid: bool, bound_s: float | None = None
) -> Bar:
    summary = engine.summary if engine else None
    if not is_valid:
        label, look = "not valid", DOUBTFUL
    if summary is None:
        return Bar(label, look, text=text)
    return Bar(label, look, summary.median_s, summary.min_s, summary.max_s, bound_s, text)


def times_figure(outcomes: Sequence[Outcome], under: str) -> Figure:
    """One group of bars per scenario, baselines below the engine under test."""
    return bars_figure([wrapped(outcome.planned.name) for outcome in outcomes], [*map(bars_of, outcomes)], under)


def bars_figure(names: Sequence[str], groups: Sequence[Sequence[Bar]], under: str) -> Figure:
    """Medians, whiskers from the fastest to the slowest refit, the lower bound as a black line where there is one.

    `names` are those of the groups, ready to be drawn. `under` is the second line of the title.
    """
    bars = [bar for group in groups for bar in group]
    title = "Refit time and lower bound" if any(bar.bound_s for bar in bars) else "Refit time"
    figure = new_figure(10, 1.9 + 0.34 * len(bars) + 0.16 * len(groups), title, under)
    axes = figure.add_subplot()
    limit_s = MAX_WHISKER * max(bar.length_s for bar in bars)
    longest_s = max(max(bar.length_s, min(bar.max_s, limit_s)) for bar in bars)
    scale, unit = time_scale(longest_s)
    axes.set_xlim(0, max(_needed(bar, limit_s, scale, longest_s) for bar in bars))
    middles, place = [], 0.0
    for group in groups:
        middles.append(place + (len(group) - 1) / 2)
        for number, bar in enumerate(group):
            _draw_bar(axes, bar, place + number, scale, limit_s)
        place += len(group) + 0.5
    axes.set_yticks(middles, names, fontsize=9)
    axes.set_ylim(place - 0.75, -0.75)
    axes.set_xlabel(f"refit time ({unit}): median of the slowest rank; whiskers: fastest and slowest refit")
    grid(axes, "x")
    legend(figure)
    return figure


def _needed(bar: Bar, limit_s: float, scale: float, longest_s: float) -> float:
    """The axis that a bar, its whisker and the text beside it need, of which the longest bar has a part at least."""
    text = _text(bar, limit_s, scale, bar.length_s < 2 * INSIDE_SHARE * longest_s)
    share = CHARACTER * max(map(len, text.split("\n")))
    return scale * max(bar.length_s, min(bar.max_s, limit_s)) / (1 - MARGIN - min(share, 0.5))


def _text(bar: Bar, limit_s: float, scale: float, has_median: bool) -> str:
    """What stands beside a bar, with its median where there is no room for that in the bar."""
    shown = _figure(scale * bar.median_s) if has_median and bar.median_s else ""
    slowest = f"slowest {_figure(scale * bar.max_s)}" if bar.max_s > limit_s else ""
    return wrapped_text(", ".join(part for part in (shown, bar.text, slowest) if part), TEXT_WIDTH)


def _draw_bar(axes: Axes, bar: Bar, place: float, scale: float, limit_s: float) -> None:
    if bar.median_s is None:
        _beside(axes, 0, place, wrapped_text(bar.text, 2 * TEXT_WIDTH))
        return
    median = scale * bar.median_s
    end_s = min(bar.max_s, limit_s)
    whiskers = [[scale * (bar.median_s - bar.min_s)], [scale * (end_s - bar.median_s)]]
    axes.barh(place, median, height=0.8, label=bar.label, xerr=whiskers, capsize=3, **bar.look.fill)
    if bar.bound_s:
        span, bound = (place - 0.47, place + 0.47), [scale * bar.bound_s] * 2
        axes.plot(bound, span, color="white", linewidth=5, solid_capstyle="butt", zorder=4)
        axes.plot(bound, span, color=BOUND, linewidth=2.5, solid_capstyle="butt", label="lower bound", zorder=5)
    shown = _figure(median)
    fits = min(median, scale * bar.min_s, scale * (bar.bound_s or bar.median_s)) > INSIDE_SHARE * axes.get_xlim()[1]
    if fits:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        axes.annotate(
            shown, (0, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, bbox=box, zorder=6
        )
    _beside(axes, scale * max(bar.length_s, end_s), place, _text(bar, limit_s, scale, not fits))


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _beside(axes: Axes, end: float, place: float, text: str) -> None:
    axes.annotate(text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
