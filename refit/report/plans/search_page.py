"""The HTML page of a search: its answer, what ranks against memory as a scatter, and its table."""

from __future__ import annotations

import math

from refit import units
from refit.config.clusters import Cluster
from refit.predict.findings import Findings, Found, Objective
from refit.report.plans.search import heading, quantised
from refit.report.plans.search_rows import cells_of, columns, is_large, merged, name_of, shown_rows
from refit.report.refits.page import STYLE, document
from refit.report.terminal.escaped import html_text

WIDTH, HEIGHT, LEFT, BELOW = 860, 420, 70, 46
NAMES = {Objective.CYCLE: "cycle", Objective.DECODE: "decode step", Objective.REFIT: "refit"}


def as_html(findings: Findings, cluster: Cluster, top: int) -> str:
    """A page that loads nothing and runs no script. `top` is the most rows where all were planned."""
    every = merged(findings, cells_of(findings))
    shown = shown_rows(findings, every, top)
    dtype, crosses = quantised(findings), any(found.crossing for found in findings.found)
    titles = columns(findings.objective, "layouts", is_large(findings.found), crosses)
    header = "".join(f"<th>{html_text(f'{each.title} {each.unit}'.strip())}</th>" for each in titles)
    body = []
    for row in shown:
        found = findings.found[row.members[0]]
        name = f"{'* ' if row.is_best else ''}{found.source} -> {name_of(row, findings, dtype)}"
        cells = "".join(f"<td>{html_text(cell)}</td>" for cell in row.cells)
        body.append(f'<tr><td class="name text">{html_text(name)}</td>{cells}</tr>')
    return document(
        "Layouts for serving" if findings.objective is not Objective.REFIT else "Layouts",
        STYLE,
        [
            *(f"<p>{html_text(line)}</p>" for line in heading(findings, cluster, every) if line),
            f"<figure>{_scatter(findings, cluster)}</figure>",
            f'<div class="scroll"><table><tr>{header}</tr>{"".join(body)}</table></div>',
        ],
    )


def _scatter(findings: Findings, cluster: Cluster) -> str:
    """What ranks (across) against memory (up), each layout a dot with its name as its title."""
    points = [
        (index, one, value)
        for index, one in enumerate(findings.found)
        if math.isfinite(value := one.value(findings.objective))
    ]
    if not points:
        return "<p>No layout has a bound.</p>"
    values, memory = [value for *_, value in points], [one.memory_bytes / 2**30 for _, one, _ in points]
    x, y = _Axis(values, LEFT, WIDTH - 20), _Axis(memory, HEIGHT - BELOW, 20)
    dots = [_dot(findings, index, one, x.at(value), y.at(one.memory_bytes / 2**30)) for index, one, value in points]
    title = f"lower bound of the {NAMES[findings.objective]} (s), {cluster.name}"
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12" font-family="sans-serif">',
            f'<path d="M{LEFT} 20V{HEIGHT - BELOW}H{WIDTH - 20}" fill="none" stroke="#5a6472"/>',
            *(
                f'<text x="{x.at(tick):.1f}" y="{HEIGHT - BELOW + 16}" text-anchor="middle">{tick:.4g}</text>'
                for tick in x.ticks
            ),
            *(f'<text x="{LEFT - 6}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>' for tick in y.ticks),
            f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html_text(title)}</text>',
            f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">'
            "memory of the fullest GPU (GiB)</text>",
            *dots,
            "</svg>",
        ]
    )


def _dot(findings: Findings, index: int, found: Found, x: float, y: float) -> str:
    best = index in findings.pareto
    name = f"{found.source} -> {found.destination}: {units.seconds(found.value(findings.objective))}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if best else 4}" fill="{"#1f4e8c" if best else "#a9cdf2"}" '
        f'fill-opacity="0.8"><title>{html_text(name)}, {units.gib(found.memory_bytes)}</title></circle>'
    )


class _Axis:
    """Turns values into places from `begin` to `end` of a picture."""

    def __init__(self, values: list[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.1 * high or 1.0
        self._low, self._high, self._begin, self._end = low - margin, high + margin, begin, end
        self.ticks = [low + step * (high - low) / 4 for step in range(5)] if high > low else [low]

    def at(self, value: float) -> float:
        return self._begin + (value - self._low) / (self._high - self._low) * (self._end - self._begin)
