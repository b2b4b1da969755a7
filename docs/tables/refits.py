"""Refits as the documents show them: tables and the sentences around them."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from refit.report.plots.caption import caption
from refit.report.plots.style import engine_title
from refit.report.refits.evidence import MAX_CV
from refit.report.refits.headline import between, marked_ms
from refit.report.refits.run_spread import exceeds_spread
from refit.report.terminal.escaped import markdown_code, markdown_text
from refit.report.terminal.grid import markdown
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult, speed_ratio
from refit.results.status import Status

LINE = 120
NOISE = "noise"
"""In place of a ratio that the spread of the refits does not support."""


def case(outcome: Outcome) -> str:
    """`TP1 EP2 -> TP1 EP2 (2+2)`: layouts and ranks of both sides, one number where they share ranks."""
    source, destination = outcome.planned.source, outcome.planned.destination
    if source is None or destination is None:
        return outcome.planned.name
    sizes = (source.world_size, destination.world_size)
    shares_ranks = bool(set(source.ranks) & set(destination.ranks))
    ranks = str(max(sizes)) if shares_ranks else f"{sizes[0]}+{sizes[1]}"
    return f"{source.title} -> {destination.title} ({ranks})"


def method(outcome: Outcome) -> str:
    """The method, and the settings that change what it does."""
    scenario, name = outcome.result.scenario if outcome.result else None, outcome.method
    options = scenario.own_options if scenario is not None else None
    return " ".join([name, *(options.words if options is not None else ())])


def by_case(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of one case side by side, in the order of the cases' first."""
    cases: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        cases.setdefault(case(outcome), []).append(outcome)
    return cases


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per result, and two columns for each baseline. Columns without figures are left out."""
    groups = by_case(outcomes).values()
    return _markdown([_row(outcome, is_first=outcome is group[0]) for group in groups for outcome in group], 2)


def _markdown(rows: Sequence[dict[str, str]], num_texts: int) -> str:
    """A table of the columns that are not empty, text in the first `num_texts`."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    used = [name for name in columns if any(row.get(name) for row in rows)]
    return markdown(used, [[row.get(name, "") for name in used] for row in rows], num_texts)


def _row(outcome: Outcome, *, is_first: bool) -> dict[str, str]:
    tested, share = outcome.tested or EngineResult(), outcome.share_of_bound
    valid = outcome.status is Status.OK
    row = {
        "case": case(outcome) if is_first else "",
        "method": markdown_text(method(outcome)),
        "bound ms": f"{1e3 * outcome.bound.seconds:.1f}" if outcome.bound and outcome.bound.seconds else "",
        "ms": marked_ms(tested) if valid else f"{marked_ms(tested)} {outcome.status.text}".strip(),
        "% of bound": f"{100 * share:.0f}" if share else "",
        "GB/s": f"{tested.bottleneck_gb_per_s:.3g}" if tested.bottleneck_gb_per_s else "",
        "connections ms": f"{1e3 * tested.connect_s:.0f}" if (tested.connect_s or 0.0) >= 0.5e-3 else "",
        "cold ms": f"{1e3 * tested.cold_total_s:.0f}" if tested.cold_s else "",
    }
    for name, engine in outcome.refit.baselines.items():
        ratio, title = speed_ratio(tested, engine), markdown_text(engine_title(name))
        wrong = f"{engine.num_wrong:,} of {engine.num_compared:,}" if engine.num_wrong else ""
        ways = f" ({markdown_text(between(outcome, name))})" if between(outcome, name) else ""
        row[f"{title} over"] = markdown_text(outcome.transport_of(name))
        row[f"{title} ms"] = marked_ms(engine) or engine.status.text
        row[f"{title} ratio"] = "" if not ratio else f"{ratio:.2f}{ways}" if differs(tested, engine) else NOISE
        row[f"{title} #wrong"] = wrong
    return row


def quantised_table(outcomes: Sequence[Outcome]) -> str:
    """One row per result, with its speed over that of the BF16 refit of the same case and method in these results."""
    rows: list[dict[str, str]] = []
    for group in by_case([_unquantised(outcome) for outcome in outcomes]).values():
        plain = {method(outcome): outcome.tested for outcome in group if outcome.refit.quantised is None}
        for outcome in group:
            tested, base = outcome.tested or EngineResult(), plain.get(method(outcome))
            row = _row(outcome, is_first=outcome is group[0])
            row = {"case": row.pop("case"), "method": row.pop("method"), "destination": _destination(outcome), **row}
            if outcome.refit.quantised and base and (ratio := speed_ratio(tested, base)):
                row["x as fast as BF16"] = f"{ratio:.2f}" if differs(tested, base) else NOISE
            row["hidden ms"] = _hidden_ms(tested)
            rows.append(row)
    return _markdown(rows, 3)


def _unquantised(outcome: Outcome) -> Outcome:
    """With a destination whose title is that of a BF16 one."""
    planned = outcome.planned
    if planned.destination is None:
        return outcome
    return replace(outcome, planned=replace(planned, destination=replace(planned.destination, quantisation=None)))


def _destination(outcome: Outcome) -> str:
    """The destination's dtype, and where it was quantised."""
    quantised = outcome.refit.quantised
    if quantised is None:
        return "BF16"
    at_source, at_destination = quantised.blocks_at_source, quantised.blocks_at_destination
    share = f"{100 * at_source / (at_source + at_destination):.0f} % at the source"
    where = "at the source" if not at_destination else "at the destination" if not at_source else share
    return f"{quantised.dtype}, {where}"


def _hidden_ms(tested: EngineResult) -> str:
    """The quantising that a GPU did beside the transfer, median over the refits' slowest ranks."""
    found = [sum(sample.beside_s.values()) for sample in tested.samples if not sample.warmup]
    return f"{1e3 * statistics.median(found):.1f}" if any(found) else ""


def quantised_section(outcomes: Sequence[Outcome]) -> str:
    """As `section`, with a `quantised_table`."""
    return section(outcomes, quantised_table)


def section(outcomes: Sequence[Outcome], tabulate: Callable[[Sequence[Outcome]], str] = table) -> str:
    """What was measured and on what, the table, and the reason of every result that is not ok."""
    reasons = [
        f"- {markdown_code(outcome.planned.name)} {outcome.status.text}: {markdown_text(outcome.reason or '')}"
        for outcome in outcomes
        if outcome.status is not Status.OK
    ]
    reasons += [f"- {line}: {count} of {len(outcomes)} rows" for line, count in _baseline_reasons(outcomes).items()]
    rows = tabulate(outcomes)
    noise = (
        f" *{NOISE}*: no ratio, as the refits vary by more than {100 * MAX_CV:.0f} % (cv) or as much as they differ."
    )
    closing = wrapped(verified(outcomes) + (noise if f" {NOISE} " in rows else ""))
    parts = [conditions(outcomes), rows, closing, *(["\n".join(reasons)] if reasons else [])]
    return "\n\n".join(parts)


def _baseline_reasons(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Why baselines have no times or no result, and in how many rows."""
    return Counter(
        f"{markdown_text(engine_title(name))} {engine.status.text}, {markdown_text(engine.reason)}"
        for outcome in outcomes
        for name, engine in outcome.refit.baselines.items()
        if engine.reason
    )


def conditions(outcomes: Sequence[Outcome]) -> str:
    """Hardware, model, date, commit, versions and settings, each with all its values where results differ."""
    environments = [outcome.result.environment for outcome in outcomes if outcome.result and outcome.result.environment]
    versions = _all_values([environment.versions for environment in environments])
    variables = _all_values([environment.variables for environment in environments])
    commits = " / ".join(dict.fromkeys(environment.commit or "" for environment in environments))
    lines = [f"{markdown_text(caption(outcomes))}, commit {commits}.", f"Versions: {versions}."]
    lines += [f"Settings: {variables}."] if variables else []
    return wrapped(" ".join(lines))


def _all_values(settings: Sequence[Mapping[str, str]]) -> str:
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: dict.fromkeys(one[name] for one in settings if name in one) for name in names}
    return ", ".join(f"{markdown_text(name)} {markdown_text(' / '.join(found))}" for name, found in values.items())


def verified(outcomes: Sequence[Outcome]) -> str:
    """How many elements were compared, and how many of them were wrong."""
    tested = [outcome.tested for outcome in outcomes if outcome.tested]
    compared, wrong = sum(one.num_compared for one in tested), sum(one.num_wrong for one in tested)
    refits = sum(len(one.samples) for one in tested)
    return f"{compared:,} elements compared over {refits} refits of this suite, {wrong:,} wrong."


def wrapped(text: str) -> str:
    """Prose in lines of LINE characters."""
    return textwrap.fill(text, LINE, break_long_words=False, break_on_hyphens=False)


def differs(ours: EngineResult, theirs: EngineResult) -> bool:
    """Whether a ratio of two medians may be quoted: neither's refits are noisy, and the difference is beyond them."""
    noise = [engine.summary.cv for engine in (ours, theirs) if engine.summary]
    return max(noise, default=0.0) <= MAX_CV and bool(exceeds_spread([ours.measured_s], [theirs.measured_s]))
