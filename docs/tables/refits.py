"""Results as the documents show them: tables, the sentences around them, the picture that the README opens with."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from refit import units
from refit.config.registry import METHODS
from refit.report.plots.caption import caption, hardware, model
from refit.report.plots.style import check_available, engine_title
from refit.report.plots.times import Bar, bars_figure, baseline_bar, tested_bar
from refit.report.refits.evidence import MAX_CV
from refit.report.refits.headline import between
from refit.report.refits.run_spread import exceeds_spread
from refit.report.refits.summary import marked_ms
from refit.report.terminal.grid import markdown
from refit.report.terminal.neutral import markdown_code, markdown_text
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult, speed_ratio
from refit.results.status import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = 120
NOISE = "noise"
"""In place of a ratio that the spread of the refits does not support."""

MAX_OPENING_CASES = 4
"""Cases in the README's picture."""


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
    if scenario is None or name not in METHODS or not METHODS[name].one_sided:
        return name
    settings = [scenario.one_sided_buffers] * (scenario.one_sided_buffers != "ring")
    settings += ["put forced"] * scenario.nvshmem_force_put
    return " ".join([name, *settings])


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
    """Hardware, model, date, versions and settings, each with all its values where results differ."""
    environments = [outcome.result.environment for outcome in outcomes if outcome.result and outcome.result.environment]
    versions = _all_values([environment.versions for environment in environments])
    variables = _all_values([environment.variables for environment in environments])
    lines = [f"{markdown_text(caption(outcomes))}.", f"Versions: {versions}."]
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


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The fastest valid result of the first case that has one."""
    for group in by_case(outcomes).values():
        if valid := [outcome for outcome in group if outcome.status is Status.OK and outcome.median_s]:
            return min(valid, key=lambda outcome: outcome.median_s or 0.0)
    return None


def opening(outcomes: Sequence[Outcome], picture: str) -> str:
    """The README's picture and what it says. Raises ValueError without a valid result."""
    one = best(outcomes)
    if one is None or one.tested is None or one.median_s is None:
        raise ValueError("no result of the opening's file is valid")
    what = f"{case(one)} of {markdown_text(str(model(one)))}"
    text = f"The refit {what} takes {units.seconds(one.median_s)} over {one.method}"
    text += f", {100 * one.share_of_bound:.0f} % of the speed that the links allow" if one.share_of_bound else ""
    text += f" ({markdown_text(str(hardware(one)))}, median of {len(one.tested.measured_s)})."
    for name, engine in one.refit.baselines.items():
        ratio = speed_ratio(one.tested, engine)
        if ratio and differs(one.tested, engine):
            text += f" {markdown_text(engine_title(name))} takes {ratio:.2f} x as long{_ways(one, name)}."
    alt = markdown_text(f"Refit times: {caption(outcomes)}")
    return f"![{alt}]({picture})\n\n{wrapped(f'{text} {verified(outcomes)}')}"


def _ways(outcome: Outcome, name: str) -> str:
    """` (cuda-ipc against Megatron-Core's nccl)`, where the baseline `name` went another way; else nothing."""
    ways = between(outcome, name, f"{engine_title(name)}'s ")
    return f" ({markdown_text(ways)})" if ways else ""


def differs(ours: EngineResult, theirs: EngineResult) -> bool:
    """Whether a ratio of two medians may be quoted: neither's refits are noisy, and the difference is beyond them."""
    noise = [engine.summary.cv for engine in (ours, theirs) if engine.summary]
    return max(noise, default=0.0) <= MAX_CV and bool(exceeds_spread([ours.measured_s], [theirs.measured_s]))


def opening_figure(outcomes: Sequence[Outcome]) -> Figure:
    """Every method's time in the first cases, and each baseline's best, in one group of bars per case.

    Raises UnavailableError without matplotlib.
    """
    check_available()
    cases = dict(list(by_case(outcomes).items())[:MAX_OPENING_CASES])
    shown = [outcome for group in cases.values() for outcome in group]
    return bars_figure(list(cases), [_bars(group) for group in cases.values()], caption(shown))


def _bars(group: Sequence[Outcome]) -> list[Bar]:
    """One bar per method, in its default setting if it was run so, and one per baseline and what it ran over."""
    methods = {outcome.method: outcome for outcome in reversed(group)}
    bars = [tested_bar(methods[name]) for name in dict.fromkeys(outcome.method for outcome in group)]
    baselines: dict[tuple[str, str], Outcome] = {}
    for outcome in group:
        for name, engine in outcome.refit.baselines.items():
            way = name, outcome.transport_of(name)
            held = baselines.setdefault(way, outcome)
            if _order(engine) < _order(held.refit.baselines[name]):
                baselines[way] = outcome
    return [*bars, *(baseline_bar(outcome, name) for (name, _), outcome in baselines.items())]


def _order(engine: EngineResult) -> tuple[bool, float]:
    """Right results first, then by time."""
    return bool(engine.doubt), engine.median_s or float("inf")


def summary(outcomes: Sequence[Outcome]) -> str:
    """One paragraph: the range of speeds, ratios and cold refits over each case's fastest method."""
    fastest = [found for group in by_case(outcomes).values() if (found := best(group))]
    tested = [one.tested for one in fastest if one.tested]
    methods = " or ".join(dict.fromkeys(one.method for one in fastest))
    rates = [engine.bottleneck_gb_per_s for engine in tested if engine.bottleneck_gb_per_s]
    text = f"On {markdown_text(str(hardware(fastest[0])))} the fastest method of each case ({methods}) moves "
    text += f"{_range(rates, '.0f')} GB/s at the busiest GPU."
    for name in dict.fromkeys(name for one in fastest for name in one.refit.baselines):
        by_ways: dict[str, list[float]] = {}
        for one in fastest:
            ours, theirs = one.tested, one.refit.baselines.get(name)
            if ours and theirs and differs(ours, theirs) and (ratio := speed_ratio(ours, theirs)):
                by_ways.setdefault(_ways(one, name), []).append(ratio)
        ratios = " and ".join(f"{_range(found, '.2f')} x as long{ways}" for ways, found in by_ways.items())
        text += f" {markdown_text(engine_title(name))} takes {ratios}." if ratios else ""
    firsts = [1e3 * engine.cold_total_s for engine in tested if engine.cold_s]
    text += (
        f" A cold refit (planning, preparing and the first refit) takes {_range(firsts, '.0f')} ms." if firsts else ""
    )
    return wrapped(f"{text} [docs/performance.md](docs/performance.md) has every row and its command.")


def _range(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(ends)
