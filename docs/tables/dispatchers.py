"""Token dispatchers as documents show them: both arms of each cell, the parts of their steps, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from docs.tables.refits import conditions, wrapped
from refit.report.refits.run_spread import beyond_text
from refit.report.steps.arms import Arm, StepRun
from refit.report.steps.cycle import cycle_lines
from refit.report.steps.dispatchers import Pairing, faster_by, pairings
from refit.report.steps.overlap import overlap_pairings
from refit.report.terminal.escaped import markdown_text
from refit.report.terminal.grid import markdown
from refit.results.outcomes import Outcome
from refit.results.step import STEP_PARTS, Breakdown

EXPERT_PARTS = ("route", "dispatch", "experts", "combine")


def section(outcomes: Sequence[Outcome]) -> str:
    """What was measured and on what, the pairs of dispatchers and of overlap, the parts of every run's step, and the
    cycle."""
    pairs = pairings(outcomes)
    overlaps = overlap_pairings(outcomes)
    arms = list({arm.repeated.name: arm for pair in (*pairs, *overlaps) for arm in (pair.first, pair.second)}.values())
    parts = [conditions(outcomes)]
    if pairs:
        parts += [_pairs(pairs), *([_overlaps(overlaps)] if overlaps else []), _legend(arms), _steps(arms)]
    cycles = [line for outcome in outcomes if outcome.result for line in cycle_lines(outcome.result)]
    return "\n\n".join([*parts, *map(wrapped, map(markdown_text, cycles))])


def _pairs(pairs: Sequence[Pairing]) -> str:
    header = ["layout", "micro-batch", "first", "ms", "second", "ms", "delta %", "faster by", "loss difference", "work"]
    return markdown(header, [_pair(pair) for pair in pairs])


def _overlaps(pairs: Sequence[Pairing]) -> str:
    header = ["layout", "micro-batch", "dispatcher", "with", "ms without", "ms with", "delta %", "beyond spread"]
    return markdown([*header, "loss difference", "work"], [_overlap(pair) for pair in pairs])


def _overlap(pair: Pairing) -> list[str]:
    where, micro, name, without, _, with_it, delta, _, difference, work = _pair(pair)
    beyond = beyond_text(pair.is_beyond_spread) if delta else ""
    return [where, micro, name, pair.second.overlap, without, with_it, delta, beyond, difference, work]


def _pair(pair: Pairing) -> list[str]:
    delta, difference = pair.delta, pair.work.loss_difference
    return [
        markdown_text(pair.first.where),
        str(pair.first.steps.micro_batch_size),
        pair.first.name,
        f"{1e3 * pair.first.mean_s:.1f}",
        pair.second.name,
        f"{1e3 * pair.second.mean_s:.1f}",
        "" if delta is None else f"{100 * delta:+.1f}",
        "" if delta is None else faster_by(pair, delta) if pair.is_beyond_spread else "within the spread",
        "" if difference is None else f"{difference:.1e}",
        "equal" if pair.work.is_equal else markdown_text(f"NOT EQUAL: {'; '.join(pair.work.problems)}"),
    ]


def _legend(arms: Sequence[Arm]) -> str:
    """What the figures are of, for all runs."""
    steps = [arm.steps for arm in arms]
    batches = sorted({f"{each.global_batch_size} sequences of {each.seq_length:,} tokens" for each in steps})
    balanced = {each.dispatch.balanced for each in steps}
    routing = (
        "forced balanced" if balanced == {True} else "in some cells forced balanced" if True in balanced else "free"
    )
    overlap = (
        " With overlap forward and backward are one part, and times of the last four overlap."
        if any(arm.steps.dispatch.overlap and run.result.breakdown for arm in arms for run in arm.runs)
        else ""
    )
    return wrapped(
        f"Mean training step of the slowest rank, {' and '.join(batches)}, routing {routing}. Below: where the time of "
        "one recorded step goes, in % of it; the last four of forward and backward together, on the rank where they "
        f"take longest.{overlap}"
    )


def _steps(arms: Sequence[Arm]) -> str:
    header = ["layout", "micro-batch", "dispatcher", "median ms", "TFLOP/s per GPU", "peak GiB"]
    runs = [(arm, run) for arm in arms for run in arm.runs]
    held = {part for _, run in runs if run.result.breakdown for part in run.result.breakdown.parts_s}
    parts = [part for part in STEP_PARTS if part in held]
    return markdown([*header, *parts, "rest", *EXPERT_PARTS], [_step(arm, run, parts) for arm, run in runs])


def _step(arm: Arm, run: StepRun, parts: Sequence[str]) -> list[str]:
    result, found = run.result, run.result.breakdown
    return [
        markdown_text(arm.where),
        str(arm.steps.micro_batch_size),
        ", ".join(filter(None, (arm.name, arm.overlap))),
        f"{1e3 * result.median_s:.1f}" if result.median_s else "",
        f"{result.tflops_per_gpu:.4g}" if result.tflops_per_gpu else "",
        f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else "",
        *(_shares(found, parts) if found is not None else [""] * (len(parts) + 1 + len(EXPERT_PARTS))),
    ]


def _shares(found: Breakdown, parts: Sequence[str]) -> Iterator[str]:
    seconds = [*(found.parts_s.get(part) for part in parts), found.rest_s]
    both = ("forward", "backward")
    seconds += [sum(found.experts_s.get(f"{part} {way}", 0.0) for way in both) for part in EXPERT_PARTS]
    return ("" if each is None else f"{100 * each / found.seconds:.1f}" for each in seconds)
