"""A search's answer as a sentence: the best layout, its time, what limits it, and what the second best costs more."""

from __future__ import annotations

from refit import units
from refit.predict.findings import Findings, Found, Objective
from refit.predict.serving.cycle import Cycle, Rollouts
from refit.predict.serving.roofline import FLOPS, MEMORY, PassBound
from refit.report.plans.search_rows import Row, name_of


def answer(findings: Findings, rows: list[Row], dtype: str | None) -> str:
    """One sentence or two; "" where nothing has a bound. `rows` are all of the search, the best first."""
    best = findings.found[rows[0].members[0]]
    if best.bound is None and findings.objective is not Objective.DECODE:
        return ""
    source = "" if len({one.source for one in findings.found}) == 1 else f"{best.source} -> "
    return (
        f"Best: {source}{name_of(rows[0], findings, dtype)}: {_time(best, findings.objective)}"
        f"{_second(findings, rows, dtype)}."
    )


def _time(found: Found, objective: Objective) -> str:
    rollouts, cycle = found.rollouts, found.cycle
    if objective is Objective.REFIT or rollouts is None or cycle is None:
        assert found.bound is not None
        return f"a refit of at least {units.seconds(found.bound.seconds)}, since {found.bound.limited_by}"
    if objective is Objective.DECODE:
        step = f"a decode step of at least {units.seconds(rollouts.decode.seconds)}"
        return f"{step}, {rollouts.tokens_per_s:,.0f} tokens/s; {limit(rollouts.decode)}"
    parts = sorted(cycle.parts.items(), key=lambda part: -part[1])
    times = ", ".join(f"{name} {units.seconds(seconds)}" for name, seconds in parts)
    return f"a cycle of at least {units.seconds(cycle.seconds)} ({times}); {_cycle_limit(found, cycle, rollouts)}"


def _cycle_limit(found: Found, cycle: Cycle, rollouts: Rollouts) -> str:
    share = f"{cycle.largest} is {100 * cycle.parts[cycle.largest] / cycle.seconds:.0f} % of it"
    if cycle.largest == "refit" and found.bound is not None:
        return f"{share}: {found.bound.limited_by}"
    passes = {"decoding": rollouts.decode, "prefill": rollouts.prefill}
    return f"{share}: {limit(passes[cycle.largest])}" if cycle.largest in passes else share


def limit(bound: PassBound) -> str:
    """`66 % of it are routed experts, limited by memory`."""
    term = bound.largest
    what = {MEMORY: "the speed of memory", FLOPS: "arithmetic"}.get(term.limited_by, term.limited_by)
    return f"{100 * term.seconds / bound.seconds:.0f} % of its time is {term.name}, limited by {what}"


def _second(findings: Findings, rows: list[Row], dtype: str | None) -> str:
    """The next row: of another destination where sources are searched too."""
    best = findings.found[rows[0].members[0]]
    is_open = len({one.source for one in findings.found}) > 1
    for row in rows[1:]:
        other = findings.found[row.members[0]]
        ratio = other.value(findings.objective) / best.value(findings.objective)
        if (is_open and other.destination == best.destination) or f"{ratio:.3f}" == "1.000":
            continue
        more = f"{100 * (ratio - 1):.1f} %" if ratio < 2 else f"{ratio - 1:.1f} times"
        return f". The second best, {other.destination.removesuffix(f' {dtype}')}, takes {more} more"
    return ""
