"""Compares two runs: what became slower or faster, and whether the change exceeds the spread of the samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from refit import units
from refit.errors import ExitCode, UsageError
from refit.report.refits.run_spread import (
    Repeated,
    beyond_text,
    by_scenario,
    exceeds_spread,
    left_out_lines,
    times_line,
)
from refit.report.refits.tables import wrong_text
from refit.report.terminal.escaped import FILE_WIDTH, plain_lines
from refit.report.terminal.grid import Column, fitted
from refit.results.outcomes import Outcome
from refit.results.plain import plain
from refit.results.runs import Run
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Pair:
    """One scenario in both sweeps, each time with all its runs."""

    name: str
    old: Repeated
    new: Repeated

    @property
    def change(self) -> float | None:
        """New median over old median, minus 1: 0.1 is 10 % slower. None unless both have times."""
        old_s, new_s = self.old.median_s, self.new.median_s
        return new_s / old_s - 1 if old_s and new_s else None

    @property
    def methods(self) -> str:
        """`nccl`; `nccl -> gloo` where the new runs' bytes were moved by another than the old ones'."""
        old, new = self.old.methods, self.new.methods
        return old if old == new else f"{old} -> {new}"

    @property
    def is_beyond_spread(self) -> bool | None:
        """Whether the medians differ by more than spread explains, within runs and between them; None where that is
        not judged."""
        return exceeds_spread(self.old.samples_s, self.new.samples_s) if self.change is not None else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs matched by scenario. `warnings` say why the times may not be comparable."""

    pairs: tuple[Pair, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    warnings: tuple[str, ...]


def compare_runs(old: Run, new: Run) -> Comparison:
    """Match two sweeps by scenario name, and single results by layouts, mode, method and model.

    A scenario is matched with all runs that `--num-runs` made of it. Of several results that match, the last one
    counts. Two runs of one result each are always a pair. Raises UsageError where nothing matches.
    """
    warnings: list[str] = []
    if _lone(old) and _lone(new):
        (ours,), (theirs,) = by_scenario(old.outcomes), by_scenario(new.outcomes)
        pairs = [Pair(theirs.name, ours, theirs)]
        warnings += _other_scenario(ours.first, theirs.first)
        only_old, only_new = [], []
    else:
        by_name = old.is_sweep and new.is_sweep
        olds, news = _keyed(old, by_name, warnings), _keyed(new, by_name, warnings)
        pairs = [Pair(name, olds[name], outcome) for name, outcome in news.items() if name in olds]
        only_old, only_new = (
            [name for name in one if name not in other] for one, other in ((olds, news), (news, olds))
        )
        if not pairs:
            listed = "; ".join(
                f"{run.sweep.run_id} has {', '.join(names)}" for run, names in ((old, olds), (new, news))
            )
            raise UsageError(plain(f"no scenario is in both runs: {listed}"))
    warnings += dict.fromkeys(warning for pair in pairs for warning in _environment_warnings(pair))
    return Comparison(tuple(pairs), tuple(only_old), tuple(only_new), tuple(warnings))


def _lone(run: Run) -> bool:
    return not run.is_sweep and len(run.outcomes) == 1


def _keyed(run: Run, by_name: bool, warnings: list[str]) -> dict[str, Repeated]:
    keyed: dict[str, Repeated] = {}
    for scenario in by_scenario(run.outcomes):
        key = scenario.name if by_name else _what_ran(scenario.first)
        if key in keyed:
            warnings.append(f"{run.sweep.run_id} has several results of {key}: the last is {scenario.name}")
        keyed[key] = scenario
    return keyed


def _what_ran(outcome: Outcome) -> str:
    """`TP2 EP2 -> TP2 EP1, collocated, nccl, kimi_k2`."""
    scenario, facts = outcome.result.scenario if outcome.result else None, outcome.refit.model
    if scenario is None:
        return outcome.planned.name
    model = scenario.model_title or (f"{facts.num_parameters:,} elements" if facts else "a model by flags")
    return f"{scenario.title}, {scenario.mode.value}, {outcome.method}, {model}"


def _other_scenario(old: Outcome, new: Outcome) -> list[str]:
    ran = [_what_ran(outcome) for outcome in (old, new)]
    return [] if ran[0] == ran[1] else [f"not the same scenario: {ran[0]} / {ran[1]}"]


def _environment_warnings(pair: Pair) -> Iterator[str]:
    """What differs between the machines, versions and sizes of the runs that count, one line each."""
    for ours, theirs in itertools.product(*(map(_conditions, each.counted) for each in (pair.old, pair.new))):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours and theirs and ours.get(name) != theirs.get(name):
                yield f"{name} differs: {ours.get(name, 'none')} / {theirs.get(name, 'none')}"


def _conditions(outcome: Outcome) -> dict[str, str]:
    environment = outcome.result.environment if outcome.result else None
    if environment is None:
        return {}
    gpus = [gpu.name for gpu in environment.gpus]
    found = {
        "GPU": f"{len(gpus)} x {gpus[0]}" if gpus else "none",
        "number of ranks": str(outcome.planned.num_ranks),
        **({"method": outcome.method} if outcome.planned.refits else {}),
        **environment.versions,
        **{name: value for name, value in environment.variables.items() if name != "SLURM_JOB_ID"},
    }
    if not gpus:
        found["CPU"] = f"{environment.num_cpus} cores of {environment.cpu}"
    if outcome.refit.plan is not None:
        found["payload"] = f"{outcome.refit.plan.payload_bytes:,} bytes"
    if (hosts := outcome.refit.hosts) is not None:
        found["hosts"] = str(len(hosts.num_ranks))
        found["relay"] = f"{hosts.relay} ({units.gb(hosts.between_bytes)} between hosts)"
    return found


def exit_code(old: Run, new: Run, comparison: Comparison, max_slowdown: float) -> ExitCode:
    """The exit code of a comparison; `max_slowdown` is a share of the old median (0.05: 5 %).

    WRONG_DATA where the new run has wrong data; else FAILED where a scenario was ok and no longer is, of several runs
    a smaller share (in two sweeps, a scenario that is gone too), or where a damaged file was skipped; else SLOWER where
    a median grew by more than `max_slowdown`; else OK.
    """
    if any(outcome.status is Status.WRONG_DATA for outcome in new.outcomes):
        return ExitCode.WRONG_DATA
    if any(pair.new.share_ok < pair.old.share_ok for pair in comparison.pairs):
        return ExitCode.FAILED
    were_ok = {scenario.name for scenario in by_scenario(old.outcomes) if scenario.share_ok}
    gone = old.is_sweep and new.is_sweep and not were_ok.isdisjoint(comparison.only_old)
    if gone or old.skipped or new.skipped:
        return ExitCode.FAILED
    slower = any(pair.change is not None and pair.change > max_slowdown for pair in comparison.pairs)
    return ExitCode.SLOWER if slower else ExitCode.OK


COLUMNS = (
    Column("scenario", is_text=True),
    Column("old", "(ms)"),
    Column("new", "(ms)"),
    Column("change", "(%)"),
    Column("beyond", "spread"),
    Column("#wrong", "old"),
    Column("#wrong", "new"),
    Column("method", is_text=True),
    Column("status", is_text=True),
)

RUNS_LEGEND = "Several runs: the median of their medians. The notch reaches at least to the farthest run's median."


def compare_text(old: Run, new: Run, comparison: Comparison, max_slowdown: float, width: int = FILE_WIDTH) -> str:
    """Warnings, the table with a legend, the scenarios in only one run, and the verdict."""
    lines = [f"Old: {old.sweep.run_id} ({old.sweep.date})", f"New: {new.sweep.run_id} ({new.sweep.date})"]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    lines += ["", *fitted(COLUMNS, [_row(pair, max_slowdown) for pair in comparison.pairs], width).split("\n")]
    lines += [
        "",
        "Medians of the slowest rank. Beyond spread: the medians' notches (1.57 x IQR / sqrt(n)) do not overlap.",
    ]
    lines += _run_lines(comparison)
    lines += [f"Only in old: {name}" for name in comparison.only_old]
    lines += [f"Only in new: {name}" for name in comparison.only_new]
    lines += [
        f"{outcome.status.text.upper()} in new: {pair.name}: {outcome.reason}"
        for pair in comparison.pairs
        if (outcome := pair.new.first).status is not Status.OK
    ]
    return plain_lines([*lines, _verdict(comparison, max_slowdown)])


def _run_lines(comparison: Comparison) -> list[str]:
    """Of scenarios with several runs: what their figures are, how far runs are apart, and which are left out."""
    lines = []
    for pair in comparison.pairs:
        for word, scenario in (("old", pair.old), ("new", pair.new)):
            if scenario.has_runs:
                found = [times_line(scenario)] if scenario.median_s else []
                lines += [f"In {word}: {line}" for line in (*found, *left_out_lines(scenario, scenario.counted))]
    return [RUNS_LEGEND, *lines] if lines else []


def _row(pair: Pair, max_slowdown: float) -> list[str]:
    both = (pair.old, pair.new)
    status = pair.new.first.status.text
    if pair.new.first.status is Status.OK and pair.change is not None:
        status = "SLOWER" if pair.change > max_slowdown else "ok"
    if pair.new.has_runs and pair.new.share_ok < 1:
        status += f" ({pair.new.count})"
    return [
        pair.name,
        *(f"{1e3 * one.median_s:.2f}" if one.median_s else "-" for one in both),
        f"{100 * pair.change:+.1f}" if pair.change is not None else "-",
        beyond_text(pair.is_beyond_spread),
        *(_wrong(one) or "-" for one in both),
        pair.methods if pair.new.first.planned.refits else "-",
        status,
    ]


def _wrong(scenario: Repeated) -> str:
    """Elements found wrong, by run where these differ."""
    return " / ".join(dict.fromkeys(filter(None, (wrong_text(run.tested) for run in scenario.outcomes))))


def _verdict(comparison: Comparison, max_slowdown: float) -> str:
    timed = [pair for pair in comparison.pairs if pair.change is not None]
    slower = [pair for pair in timed if pair.change is not None and pair.change > max_slowdown]
    allowed = f"{100 * max_slowdown:g} %"
    if not timed:
        return "No scenario has times in both runs."
    total = f"{len(timed)} scenario{'' if len(timed) == 1 else 's'}"
    if not slower:
        return f"None of {total} is slower by more than {allowed}."
    return f"{len(slower)} of {total} slower by more than {allowed}: {', '.join(pair.name for pair in slower)}"
