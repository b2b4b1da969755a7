"""Random layouts as documents show them: one row for each pair of formats."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables import refits as results_text
from refit.config.scenario import Mode
from refit.report.terminal.grid import markdown
from refit.results.outcomes import Outcome

DTYPES = ("bf16", "fp8-block", "mxfp8")
AXES = ("tp", "pp", "ep", "etp")


def section(outcomes: Sequence[Outcome]) -> str:
    """What was run and on what, the table, and the reason of every layout that is not right."""
    return results_text.section(outcomes, table)


def table(outcomes: Sequence[Outcome]) -> str:
    """Layouts by the formats of both sides: of each dtype, collocated, with sizes that change; elements compared."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        source, destination = outcome.planned.source, outcome.planned.destination
        if source is not None and destination is not None:
            groups.setdefault(f"{source.format} -> {destination.format}", []).append(outcome)
    if len(groups) > 1:
        groups["all"] = [outcome for group in groups.values() for outcome in group]
    titles = ["formats", "layouts", *DTYPES, "collocated", *(f"{axis.upper()} changes" for axis in AXES)]
    titles += ["elements compared", "wrong"]
    return markdown(titles, [[name, *_counts(group)] for name, group in groups.items()], 1)


def _counts(group: Sequence[Outcome]) -> list[str]:
    sides = [(one.planned.source, one.planned.destination) for one in group]
    dtypes = [after.quantisation.dtype if after and after.quantisation else "bf16" for _, after in sides]
    changes = [
        sum(before and after and getattr(before.layout, axis) != getattr(after.layout, axis) for before, after in sides)
        for axis in AXES
    ]
    tested = [one.refit.tested for one in group if one.refit.tested is not None]
    figures = [
        len(group),
        *map(dtypes.count, DTYPES),
        sum(one.planned.mode == Mode.COLLOCATED.value for one in group),
        *changes,
        sum(engine.num_compared for engine in tested),
        sum(engine.num_wrong for engine in tested),
    ]
    return [f"{int(figure or 0):,}" for figure in figures]
