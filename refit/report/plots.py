"""Pictures of a run, as PNG. They are readable in greyscale: hatches and markers repeat what colours show.

Only this module needs matplotlib. It is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refit.errors import UnavailableError
from refit.plan.cost import Cost
from refit.plan.plan import IntArray
from refit.report.neutral import MAX_CELL, picture_text
from refit.results.outcomes import Outcome
from refit.results.plain import plain
from refit.results.runs import Run
from refit.results.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, BASELINE, BOUND = "#2b6cb0", "#c8c8c8", "black"
WRONG_HATCH = "xx"
"""Bars of results that do not count."""

NAME_WIDTH = 40
"""Characters after which a scenario's name is wrapped."""

MAX_NUMBERED_RANKS = 16
"""Up to this many ranks, each has a label on its axis."""

BYTE_SCALES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def check_available() -> None:
    """Raise UnavailableError, with the remedy, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError("pictures need matplotlib: pip install matplotlib") from None


Pairs = Callable[[Outcome], IntArray]
"""Gives the bytes from each rank (row) to each rank (column) of a scenario, or raises NoPairs."""


class NoPairs(ValueError):
    """The bytes between pairs of ranks are not available. The message gives the reason."""


def draw(run: Run, directory: Path, pairs: Pairs) -> Iterator[Path | str]:
    """Draw every picture that the run's results allow: the path of each, or a line with the reason why it is missing.

    Existing files of these names are replaced. Raises UnavailableError without matplotlib.
    """
    check_available()
    directory.mkdir(parents=True, exist_ok=True)
    if any(outcome.median_s for outcome in run.outcomes):
        yield _save(times_figure(run.outcomes, run.sweep.title), directory / "times.png")
        if any(outcome.tested and outcome.tested.measured_s for outcome in run.outcomes):
            yield _save(iterations_figure(run.outcomes), directory / "iterations.png")
    else:
        yield "no times: no scenario of this run has any"
    for outcome in run.outcomes:
        yield from _scenario_pictures(outcome, pairs, directory)


def _scenario_pictures(outcome: Outcome, pairs: Pairs, directory: Path) -> Iterator[Path | str]:
    name, plan = outcome.planned.name, outcome.refit.plan
    if plan is None:
        yield f"{name}: no bytes: {outcome.reason or 'its result has none'}"
        return
    yield _save(rank_bytes_figure(name, plan), directory / f"{name}_bytes.png")
    try:
        yield _save(pairs_figure(name, pairs(outcome), outcome), directory / f"{name}_pairs.png")
    except NoPairs as reason:
        yield f"{name}: no bytes between pairs of ranks: {reason}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def times_figure(outcomes: Sequence[Outcome], title: str) -> Figure:
    """Median time of each scenario, whiskers from the fastest to the slowest refit, the lower bound as a black line."""
    figure = _new(10, 1.6 + 0.55 * len(outcomes))
    axes = figure.add_subplot()
    longest_s = max(_longest(outcome) for outcome in outcomes)
    scale, unit = (1.0, "s") if longest_s >= 1 else (1e3, "ms")
    for row, outcome in enumerate(outcomes):
        _time_bars(axes, outcome, row, scale)
    axes.set_yticks(range(len(outcomes)), [_wrapped(outcome.planned.name) for outcome in outcomes], fontsize=9)
    axes.set_ylim(len(outcomes) - 0.5, -0.5)
    axes.set_xlim(0, 1.45 * scale * longest_s)  # space for the texts beside the bars
    axes.set_xlabel(f"refit time ({unit}), median of the slowest rank; whiskers: fastest and slowest refit")
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    figure.suptitle("Refit time and lower bound" + (f", {picture_text(title)}" if title else ""))
    _legend(figure, "outside lower center")
    return figure


def _wrapped(name: str) -> str:
    name = plain(name, MAX_CELL)
    parts = (name[start : start + NAME_WIDTH] for start in range(0, len(name), NAME_WIDTH))
    return "\n".join(picture_text(part) for part in parts)


def _legend(figure: Figure, place: str) -> None:
    """One entry for each label of all the figure's axes."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc=place, ncols=4, frameon=False)


def _longest(outcome: Outcome) -> float:
    """Seconds at which a scenario's bars, whiskers and bound end; 0 without times."""
    theirs = outcome.baseline.median_s if outcome.baseline else None
    return max(_own_end(outcome), theirs or 0.0)


def _own_end(outcome: Outcome) -> float:
    summary = outcome.tested.summary if outcome.tested else None
    bound_s = outcome.bound.seconds if outcome.bound and summary else 0.0
    return max(summary.max_s if summary else 0.0, bound_s)


def _time_bars(axes: Axes, outcome: Outcome, row: int, scale: float) -> None:
    summary = outcome.tested.summary if outcome.tested else None
    theirs = outcome.baseline.median_s if outcome.baseline else None
    if summary is None:
        _beside(axes, 0, row, outcome.status.text)
        return
    height, place = (0.38, row - 0.19) if theirs is not None else (0.5, row)
    whiskers = [[scale * (summary.median_s - summary.min_s)], [scale * (summary.max_s - summary.median_s)]]
    style: dict[str, Any] = {"height": height, "edgecolor": "black", "linewidth": 0.8}
    is_valid, median = outcome.status is Status.OK, scale * summary.median_s
    label, hatch = ("refit", None) if is_valid else ("refit, not valid", WRONG_HATCH)
    axes.barh(place, median, color=OURS, hatch=hatch, label=label, xerr=whiskers, capsize=3, **style)
    share = f", share of bound {100 * outcome.share_of_bound:.1f} %" if outcome.share_of_bound else ""
    status = "" if is_valid else f", {outcome.status.text}"
    _beside(axes, scale * _own_end(outcome), place, f"{median:.4g}{share}{status}")
    if theirs is not None:
        doubt = outcome.baseline.doubt if outcome.baseline else None
        label, hatch = _baseline_label(doubt), WRONG_HATCH if doubt else "//"
        axes.barh(row + 0.19, scale * theirs, color=BASELINE, hatch=hatch, label=label, **style)
        _beside(axes, scale * theirs, row + 0.19, f"{scale * theirs:.4g}" + (f", {doubt.lower()}" if doubt else ""))
    if outcome.bound and outcome.bound.seconds:
        span = (place - 0.62 * height, place + 0.62 * height)
        bound = [scale * outcome.bound.seconds] * 2
        axes.plot(bound, span, color="white", linewidth=5, solid_capstyle="butt", zorder=4)
        axes.plot(bound, span, color=BOUND, linewidth=2.5, solid_capstyle="butt", label="lower bound", zorder=5)


def _baseline_label(doubt: str | None) -> str:
    return f"Megatron-Core, {doubt.lower()}" if doubt else "Megatron-Core"


def _beside(axes: Axes, end: float, place: float, text: str) -> None:
    axes.annotate(text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)


def iterations_figure(outcomes: Sequence[Outcome]) -> Figure:
    """One panel per scenario: every refit in order, warm-up refits hollow, the median dashed."""
    measured = [outcome for outcome in outcomes if outcome.tested and outcome.tested.measured_s]
    columns = min(2, len(measured))
    rows = math.ceil(len(measured) / columns)
    figure = _new(5.5 * columns + (columns == 1) * 2, 1.2 + 2.1 * rows)
    for place, outcome in enumerate(measured, 1):
        axes = figure.add_subplot(rows, columns, place)
        _iterations(axes, outcome)
        axes.set_title(_wrapped(outcome.planned.name), fontsize=9)
    figure.supxlabel("refit (hollow: warm-up)", fontsize=10)
    figure.supylabel("slowest rank (ms)", fontsize=10)
    _legend(figure, "outside upper center")
    return figure


def _iterations(axes: Axes, outcome: Outcome) -> None:
    from matplotlib.ticker import MaxNLocator

    baseline = _baseline_label(outcome.baseline.doubt if outcome.baseline else None)
    series = ((outcome.tested, "refit", OURS, "o"), (outcome.baseline, baseline, "0.45", "s"))
    for engine, name, color, marker in series:
        if engine is None or not engine.measured_s:
            continue
        times_ms = [1e3 * seconds for seconds in (*engine.warmup_s, *engine.measured_s)]
        warmups = len(engine.warmup_s)
        numbers = range(1, len(times_ms) + 1)
        axes.plot(numbers, times_ms, color=color, linewidth=1)
        axes.plot(numbers[:warmups], times_ms[:warmups], marker, color=color, fillstyle="none", markerfacecolor="white")
        axes.plot(numbers[warmups:], times_ms[warmups:], marker, color=color, label=name)
        median_ms = float(np.median(times_ms[warmups:]))
        axes.axhline(median_ms, color=color, linewidth=0.8, linestyle="--", label=f"median, {name}")
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def rank_bytes_figure(name: str, plan: Cost) -> Figure:
    """Wire bytes of each rank: received above the axis, sent below; the mean of each side's ranks dashed."""
    sides = [plan.received_by_rank, plan.sent_by_rank]
    ranks = sorted({rank for side in sides for rank in side})
    scale, unit = _byte_scale(max((nbytes for side in sides for nbytes in side.values()), default=0))
    figure = _new(10, 4.2)
    axes = figure.add_subplot()
    edge = 0.6 if len(ranks) <= 2 * MAX_NUMBERED_RANKS else 0.0
    styles = ((1, "received", OURS, None), (-1, "sent", BASELINE, "///" if edge else None))
    for side, (sign, label, color, hatch) in zip(sides, styles, strict=True):
        heights = [sign * nbytes / scale for nbytes in side.values()]
        outline = "black" if edge else "none"
        axes.bar(
            list(side), heights, width=0.8, color=color, hatch=hatch, label=label, edgecolor=outline, linewidth=edge
        )
        mean = sum(heights) / len(heights)
        axes.axhline(mean, color="black", linestyle="--" if sign > 0 else ":", linewidth=1, label=f"mean {label}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_ylabel(f"bytes over the wire ({unit})\nsent below, received above")
    axes.set_xlim(ranks[0] - 0.7, ranks[-1] + 0.7)
    _rank_axis(axes.xaxis, ranks[-1] - ranks[0] + 1)
    axes.set_xlabel("rank")
    axes.set_title(f"{_wrapped(name)}\nbytes of each rank", fontsize=11)
    axes.grid(axis="y", color="0.85")
    axes.set_axisbelow(True)
    _legend(figure, "outside lower center")
    return figure


def pairs_figure(name: str, matrix: IntArray, outcome: Outcome) -> Figure:
    """Heat map of bytes from each source rank (rows) to each destination rank (columns); nothing moved is white.

    Raises NoPairs where the matrix is not that of the scenario's ranks.
    """
    scenario = outcome.result.scenario if outcome.result else None
    everyone = range(len(matrix))
    rows, columns = (scenario.source.ranks, scenario.destination.ranks) if scenario else (everyone, everyone)
    if max(rows.stop, columns.stop) > len(matrix):
        raise NoPairs(f"its flags give {len(matrix)} ranks, its layouts {max(rows.stop, columns.stop)}")
    shown = matrix[rows.start : rows.stop, columns.start : columns.stop].astype(float)
    scale, unit = _byte_scale(shown.max(initial=0))
    figure = _new(8, 6.6)
    axes = figure.add_subplot()
    extent = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
    masked = np.ma.masked_equal(shown / scale, 0)
    image = axes.imshow(masked, cmap="cividis_r", vmin=0, extent=extent, interpolation="nearest", aspect="auto")
    figure.colorbar(image, ax=axes, label=f"{unit} from source to destination rank (white: none)")
    if max(shown.shape) <= MAX_NUMBERED_RANKS:
        _write_cells(axes, shown / scale, rows.start, columns.start)
    _rank_axis(axes.xaxis, len(columns))
    _rank_axis(axes.yaxis, len(rows))
    axes.set_xlabel("destination rank")
    axes.set_ylabel("source rank")
    local = "; same rank: a local copy" if set(rows) & set(columns) else ""
    axes.set_title(f"{_wrapped(name)}\nbytes of each pair of ranks{local}", fontsize=11)
    return figure


def _write_cells(axes: Axes, values: np.ndarray[Any, np.dtype[np.float64]], first_row: int, first_column: int) -> None:
    for row, column in np.argwhere(values):
        value = values[row, column]
        color = "white" if value > values.max() / 2 else "black"
        place = (first_column + column, first_row + row)
        axes.annotate(
            f"{value:.2f}" if value >= 0.005 else "~0", place, color=color, ha="center", va="center", fontsize=8
        )


def _rank_axis(axis: Any, num_ranks: int) -> None:
    """Label every rank, or every 4th, 8th, 16th, ... where there are many. Hosts begin at multiples of these."""
    from matplotlib.ticker import MultipleLocator

    steps = (1, *(2**power for power in range(2, 21)))
    step = next(step for step in steps if num_ranks / step <= MAX_NUMBERED_RANKS)
    axis.set_major_locator(MultipleLocator(step))


def _byte_scale(largest: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in BYTE_SCALES if largest >= scale), (1.0, "bytes"))
