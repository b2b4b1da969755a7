"""Answers questions from a sweep's results, in sentences with figures.

EP against TP, the cost of separate GPU sets, how time scales with bytes, one-sided against two-sided transport, and
what quantising saves where a destination quantises, and from which share of changed weights on sending all is as fast.
Where results are missing for an answer, the answer names them.
Where versions, spread or fit do not support a conclusion (`evidence`), one line says why.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from refit import units
from refit.config.registry import METHODS
from refit.config.scenario import Mode
from refit.report.refits import evidence
from refit.report.refits.points import Point, median, points_of
from refit.report.refits.run_spread import Samples, by_scenario
from refit.report.refits.scaling import scalings
from refit.report.refits.shares import shares_lines
from refit.report.terminal.escaped import plain_lines
from refit.results.outcomes import Outcome

NEARLY_EQUAL = 1.05
"""Two rates with a smaller ratio than this count as equal."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A question and its answer from the results."""

    question: str
    answer: tuple[str, ...]


def analysis_text(outcomes: Sequence[Outcome]) -> str:
    """All questions and answers, without a newline at the end; empty where nothing was measured."""
    findings = analyse(outcomes)
    if not findings:
        return ""
    blocks = [plain_lines([finding.question, *(f"  {line}" for line in finding.answer)]) for finding in findings]
    return "\n".join(["Analysis:", "---------", "", "\n\n".join(blocks)])


def analyse(outcomes: Sequence[Outcome]) -> list[Finding]:
    """The findings over every scenario with times and without wrong data; empty where there is none.

    A single scenario with refits answers none of the questions, so it has no findings.
    """
    points = points_of(outcomes)
    if not points or len(by_scenario([outcome for outcome in outcomes if outcome.planned.refits])) == 1:
        return []
    findings = [
        Finding("EP against TP: which change of layout is faster?", tuple(ep_against_tp(points))),
        Finding("Non-collocated overhead: what do separate GPU sets cost?", tuple(separate_sets(points))),
        Finding("Scaling: is the time proportional to the bytes?", tuple(scaling(points))),
        Finding(
            f"{_rivalry(points)}: which is faster for the same layouts?", tuple(one_sided_against_two_sided(points))
        ),
    ]
    if any(point.quantisation for point in points):
        findings.append(Finding("FP8: how much faster is a refit that quantises?", tuple(quantised(points))))
    if shares := shares_lines(outcomes):
        findings.append(Finding("Deltas: up to which share of changed weights is sending them faster?", tuple(shares)))
    return findings


def _rivalry(points: Sequence[Point]) -> str:
    """`NVSHMEM against NCCL` where no other methods were run than those that `refit search` writes."""
    found, written = {point.method for point in points}, [name for name, row in METHODS.items() if row.suggested_for]
    versus = " against ".join(name.upper() for name in written)
    return versus if found <= set(written) else "One-sided against two-sided methods"


def ep_against_tp(points: Sequence[Point]) -> list[str]:
    """Compare GB/s and share of the bound: only EP changes against only TP (and ETP with it) changes."""
    lines = []
    for (mode, method, *_), group in _grouped(
        points, lambda point: (point.mode, point.method, point.model, point.quantisation)
    ):
        only_ep = [point for point in group if _changes(point) == {"ep"}]
        only_tp = [point for point in group if _changes(point) in ({"tp"}, {"tp", "etp"})]
        if not only_ep or not only_tp:
            continue
        rates = [median(point.gb_per_s for point in side) for side in (only_ep, only_tp)]
        lines += [
            f"{mode}, {method}: only EP changes: {_averages(only_ep)}",
            f"  only TP changes: {_averages(only_tp)}",
        ]
        if rates[0] and rates[1]:
            faster, ratio = ("EP", rates[0] / rates[1]) if rates[0] >= rates[1] else ("TP", rates[1] / rates[0])
            if ratio < NEARLY_EQUAL:
                reason = evidence.not_equal([*only_ep, *only_tp], NEARLY_EQUAL - 1, _rates)
                conclusion = "Both move their bytes equally fast."
            else:
                reason = evidence.no_difference(only_ep, only_tp, _rates)
                conclusion = f"{faster} moves its bytes {ratio:.2f} x as fast."
            lines.append(f"  No conclusion: {reason}." if reason else f"  {conclusion}")
    missing = "needs a scenario in which only EP changes and one in which only TP does, same mode, method and model"
    return lines or [f"Not answered: {missing}."]


def _rates(point: Point) -> Samples:
    """GB/s of each measured refit, by run."""
    gigabytes = (point.gb_per_s or 0.0) * point.median_s
    return [[gigabytes / seconds for seconds in run if seconds] for run in point.samples_s]


def _changes(point: Point) -> set[str]:
    return {
        axis
        for axis in ("tp", "ep", "etp", "pp")
        if getattr(point.source.layout, axis) != getattr(point.destination.layout, axis)
    }


def _averages(points: Sequence[Point]) -> str:
    """`45.20 ms, 49.2 GB/s, 96 % of the lower bound (median of 2: A, B)`."""
    rate, share = median(point.gb_per_s for point in points), median(point.share for point in points)
    parts = [units.seconds(statistics.median(point.median_s for point in points))]
    parts += [f"{rate:.1f} GB/s at the busiest {points[0].place}"] if rate else []
    parts += [f"{100 * share:.0f} % of the speed the lower bound allows"] if share else []
    names = ", ".join(point.name for point in points)
    return f"{', '.join(parts)} ({names if len(points) == 1 else f'medians of {len(points)}: {names}'})"


def separate_sets(points: Sequence[Point]) -> list[str]:
    """Compare pairs with the same layouts and method in both modes; without such pairs, the two modes as a whole."""
    lines = []
    for _, group in _grouped(points, lambda point: (point.layouts, point.method, point.model)):
        by_mode = {point.mode: point for point in group}
        apart, shared = by_mode.get(Mode.NON_COLLOCATED.value), by_mode.get(Mode.COLLOCATED.value)
        if not apart or not shared:
            continue
        if reason := evidence.no_difference([apart], [shared]):
            lines.append(f"{apart.name} against {shared.name}: no conclusion: {reason}.")
        else:
            lines.append(
                f"{apart.name} on {apart.num_gpus} {apart.place}s takes {apart.median_s / shared.median_s:.2f} x the "
                f"time of {shared.name} on {shared.num_gpus}: {units.seconds(apart.median_s)} against "
                f"{units.seconds(shared.median_s)}; {_wire(apart)} of its bytes leave a {apart.place} against "
                f"{_wire(shared)}."
            )
    return lines or _modes_side_by_side(points)


def _modes_side_by_side(points: Sequence[Point]) -> list[str]:
    lines, rates, groups = [], {}, {}
    for (mode, model), group in _grouped(points, lambda point: (point.mode, (point.model, point.quantisation))):
        groups[model, mode] = group
        rates[model, mode] = statistics.median(point.s_per_gb for point in group)
        wire = sum(point.wire for point in group) / sum(point.payload for point in group)
        what = [_methods(group), *_dtype(group[0]), f"{len(group)} scenario{'s' * (len(group) > 1)}"]
        place = group[0].place
        lines.append(
            f"{mode} ({'; '.join(what)}): {units.seconds(rates[model, mode])} "
            f"per GB into each destination {place}, {100 * wire:.0f} % of the bytes leave a {place}."
        )
    apart, shared = (mode.value for mode in (Mode.NON_COLLOCATED, Mode.COLLOCATED))
    both = [model for model, mode in rates if mode == apart and (model, shared) in rates]
    if not both:
        return ["Not answered: needs scenarios of the same model in both modes."]
    ratios = []
    for model in both:
        reason = evidence.no_difference(groups[model, apart], groups[model, shared], _s_per_gb)
        ratio = rates[model, apart] / rates[model, shared]
        methods = list(dict.fromkeys(_methods(groups[model, mode]) for mode in (apart, shared)))
        which = [*_dtype(groups[model, apart][0]), *([" against ".join(methods)] if len(methods) > 1 else [])]
        between = f" ({'; '.join(which)})" if which else ""
        conclusion = f"Separate sets take {ratio:.2f} x as long per GB{between}."
        ratios.append(f"No conclusion: {reason}." if reason else conclusion)
    return [*lines, *ratios, "No layouts were run both ways, so layouts and methods differ too: an indication only."]


def _dtype(point: Point) -> list[str]:
    """The FP8 dtype of its destination, where it has one."""
    return [point.quantisation.dtype] if point.quantisation else []


def _methods(points: Sequence[Point]) -> str:
    return ", ".join(sorted({point.method for point in points}))


def _s_per_gb(point: Point) -> Samples:
    """Seconds per GB into each destination GPU, of each measured refit, by run."""
    return [[point.s_per_gb * seconds / point.median_s for seconds in run] for run in point.samples_s]


def _wire(point: Point) -> str:
    return f"{100 * point.wire / point.payload:.0f} %"


def scaling(points: Sequence[Point]) -> list[str]:
    """Per mode and method: the cost of one transfer and the bandwidth, or why they cannot be determined."""
    lines = []
    for group in scalings(points):
        if group.reason or group.fit is None:
            lines.append(f"{group.mode}, {group.method}: {group.reason}.")
            continue
        place = points[0].place
        fit, largest = group.fit, max(group.loads, key=lambda load: load.nbytes)
        by_bytes = fit.bytes_s(largest) / (fit.bytes_s(largest) + fit.operations_s(largest))
        lines += [
            f"{group.mode}, {group.method}: time = {units.seconds(fit.operation_s)} x transfers per destination "
            f"{place} + "
            f"busiest rank's bytes / {fit.bytes_per_s / 1e9:.1f} GB/s ({len(group.loads)} scenarios, "
            f"off by {100 * fit.worst_error:.0f} % at most).",
            f"  Of the largest, {units.gb(largest.nbytes)} in {largest.operations:,.0f} transfers, "
            f"{100 * by_bytes:.0f} % of the time goes with the bytes.",
        ]
    return lines


def one_sided_against_two_sided(points: Sequence[Point]) -> list[str]:
    """Compare pairs of scenarios that differ only in the method."""
    lines = []
    for (_, mode, _), group in _grouped(points, lambda point: (point.layouts, point.mode, point.model)):
        by_method = {point.method: point for point in group}
        for one, two in rivals():
            if one in by_method and two in by_method:
                times = by_method[one].median_s, by_method[two].median_s
                reason = evidence.no_difference([by_method[one]], [by_method[two]])
                conclusion = f"no conclusion: {reason}" if reason else f"{one} is {times[1] / times[0]:.2f} x as fast"
                lines.append(
                    f"{group[0].title}, {mode}: {one} {units.seconds(times[0])}, {two} "
                    f"{units.seconds(times[1])}: {conclusion}."
                )
    return lines or ["Not answered: no layouts were run with both methods in the same mode."]


def quantised(points: Sequence[Point]) -> list[str]:
    """Compare each scenario whose destination is quantised with the one that differs only in that it is not."""
    lines = []
    for (_, mode, method, _), group in _grouped(
        points, lambda point: (point.unquantised_layouts, point.mode, point.method, point.model)
    ):
        plain = next((point for point in group if point.quantisation is None), None)
        for point in group:
            if plain is None or point.quantisation is None:
                continue
            reason = evidence.no_difference([plain], [point])
            conclusion = f"no conclusion: {reason}" if reason else f"{plain.median_s / point.median_s:.2f} x as fast"
            share = ""
            if plain.busiest:  # a rank that copies within itself sends nothing
                share = f", with {100 * point.busiest / plain.busiest:.0f} % of the busiest {point.place}'s bytes"
            lines.append(
                f"{plain.title}, {mode}, {method}: {point.quantisation.dtype} {units.seconds(point.median_s)}, without "
                f"{units.seconds(plain.median_s)}: {conclusion}{share}."
            )
    return lines or ["Not answered: no layouts were run with and without --rl-inference-dtype in the same mode."]


def rivals() -> list[tuple[str, str]]:
    """One-sided and two-sided methods that move weights on the same device by default."""
    return [
        (one, two)
        for one, first in METHODS.items()
        for two, second in METHODS.items()
        if first.one_sided and not second.one_sided and first.device == second.device
    ]


def _grouped(
    points: Iterable[Point], key: Callable[[Point], tuple[Hashable, ...]]
) -> list[tuple[tuple[Any, ...], list[Point]]]:
    groups = defaultdict(list)
    for point in points:
        groups[key(point)].append(point)
    return list(groups.items())
