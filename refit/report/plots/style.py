"""What all pictures share: fills that differ in grey, text from files, axes of ranks, scales of bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refit.config.registry import ENGINES, METHODS
from refit.errors import UnavailableError
from refit.report.terminal.escaped import MAX_CELL, picture_text
from refit.results.outcomes import Outcome
from refit.results.plain import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = "0.3"
"""The grey of lines that join markers."""

NAME_WIDTH = 40
"""Characters after which a scenario's name is wrapped."""

TITLE_WIDTH = 80
"""The same where it is the title of a picture."""

MAX_NUMBERED_RANKS = 16
"""Up to this many ranks, each has a label on its axis."""

DARK = 120
"""The most that the parts of a marker's colour are on average, of 255."""

BYTE_SCALES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Look:
    """Fill, hatch and marker of one series."""

    color: str
    hatch: str | None
    marker: str

    @property
    def fill(self) -> dict[str, Any]:
        """Arguments of a bar."""
        return {"color": self.color, "hatch": self.hatch, "edgecolor": "black", "linewidth": 0.8}

    @property
    def marker_color(self) -> str:
        """The fill, darker where it is pale: a small marker has no hatch, and a hollow one means something else."""
        parts = [int(self.color[place : place + 2], 16) for place in (1, 3, 5)]
        share = min(1.0, DARK / (sum(parts) / 3))
        return "#" + "".join(f"{round(share * part):02x}" for part in parts)


# Neighbours differ in lightness and in hatch.
METHOD_LOOKS = (
    Look("#1f4e8c", None, "o"),
    Look("#a9cdf2", "//", "s"),
    Look("#4f8fd0", "..", "^"),
    Look("#dfeaf7", "\\\\", "D"),
    Look("#3a6ea5", "--", "v"),
    Look("#c3d9ee", "++", "P"),
)
BASELINE_LOOKS = (
    Look("#d9d9d9", "||", "s"),
    Look("#9a9a9a", "oo", "D"),
    Look("#f2f2f2", "--", "v"),
    Look("#b5b5b5", "**", "^"),
    Look("#7d7d7d", "++", "P"),
    Look("#cdcdcd", "xx", "P"),
    Look("#e6e6e6", "\\\\", "v"),
)
PHASE_LOOKS = tuple(
    Look(color, hatch, "o")
    for color, hatch in (
        ("#1f4e8c", None),
        ("#a9cdf2", "//"),
        ("#6f9fd0", ".."),
        ("#dfeaf7", "\\\\"),
        ("#355f8f", "xx"),
        ("#c9c9c9", None),
        ("#8a8a8a", "++"),
        ("#ececec", "oo"),
    )
)
DOUBTFUL = Look("white", "xxx", "x")
"""Results that do not count: wrong, failed or unverified."""


def check_available() -> None:
    """Raise UnavailableError, with the remedy, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError("pictures need matplotlib: pip install matplotlib") from None


def new_figure(width: float, height: float, title: str, under: str) -> Figure:
    """A figure with its title and, below it, hardware, model and date. Sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    lines = [title, *textwrap.wrap(under, int(14 * width))]
    figure.suptitle("\n".join(lines), fontsize=10.5)
    return figure


def save(figure: Figure, path: Path, **metadata: str) -> Path:
    """Write a PNG, with `metadata` as its text chunks."""
    figure.savefig(path, dpi=120, format="png", metadata=metadata)
    return path


def method_look(name: str) -> Look:
    """The look of a refit method, by its place among the registered ones."""
    return METHOD_LOOKS[_place(name, list(METHODS)) % len(METHOD_LOOKS)]


def baseline_look(name: str) -> Look:
    """The look of a baseline, by its place among the registered ones."""
    return BASELINE_LOOKS[
        _place(name, [known for known, row in ENGINES.items() if row.is_baseline]) % len(BASELINE_LOOKS)
    ]


def _place(name: str, known: Sequence[str]) -> int:
    return known.index(name) if name in known else len(known)


def engine_title(name: str) -> str:
    """What reports call an engine."""
    return ENGINES[name].title if name in ENGINES else picture_text(name)


def tested_title(outcome: Outcome) -> str:
    """`refit over nvshmem`: the engine under test and what moved its bytes."""
    return ran_title(
        outcome, next((name for name in outcome.refit.engines if name not in outcome.refit.baselines), "refit")
    )


def ran_title(outcome: Outcome, name: str) -> str:
    """`Megatron-Core over gloo`: an engine and what moved its bytes."""
    return f"{engine_title(name)} over {picture_text(outcome.transport_of(name))}"


def wrapped(name: str, width: int = NAME_WIDTH) -> str:
    """A scenario's name in lines of at most `width` characters, broken after a blank or an underscore if any."""
    rest, lines = plain(name, MAX_CELL), []
    while len(rest) > width:
        end = max(rest.rfind(sign, 0, width) for sign in "_ ") + 1 or width
        lines.append(rest[:end])
        rest = rest[end:]
    return "\n".join(picture_text(line) for line in (*lines, rest))


def wrapped_text(text: str, width: int) -> str:
    """Sentences in lines of `width` characters, three at most."""
    lines = textwrap.wrap(plain(text, MAX_CELL), width, max_lines=3, placeholder=" ...")
    return "\n".join(picture_text(line) for line in lines)


def legend(figure: Figure, place: str = "outside lower center", panels: Sequence[Axes] = ()) -> None:
    """One entry for each label of these axes, of all the figure's without `panels`."""
    entries: dict[str, Any] = {}
    for axes in panels or figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        # Handles larger than usual, so that hatches can be told apart.
        figure.legend(
            entries.values(), entries.keys(), loc=place, ncols=3, frameon=False, handlelength=3, handleheight=1.4
        )


def grid(axes: Axes, axis: Literal["both", "x", "y"]) -> None:
    axes.grid(axis=axis, color="0.87")
    axes.set_axisbelow(True)


def rank_axis(axis: Any, num_ranks: int) -> None:
    """Label every rank, or every 4th, 8th, 16th, ... where there are many. Hosts begin at multiples of these."""
    from matplotlib.ticker import MultipleLocator

    steps = (1, *(2**power for power in range(2, 21)))
    step = next(step for step in steps if num_ranks / step <= MAX_NUMBERED_RANKS)
    axis.set_major_locator(MultipleLocator(step))


def byte_scale(largest: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in BYTE_SCALES if largest >= scale), (1.0, "bytes"))


def time_scale(longest_s: float) -> tuple[float, str]:
    """Factor from seconds to the unit of an axis, and the unit."""
    return (1.0, "s") if longest_s >= 1 else (1e3, "ms")
