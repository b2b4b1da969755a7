"""Token dispatchers as docs/performance.md shows them: both arms of each cell, the parts of their steps, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.results_text import conditions, wrapped
from refit.report.arms import Arm, StepRun, arms_of
from refit.report.cycle import cycle_lines
from refit.report.dispatchers import Pairing, faster_by, pairings
from refit.report.grid import markdown
from refit.report.neutral import markdown_text
from refit.results.outcomes import Outcome
from refit.results.step import STEP_PARTS, Breakdown

EXPERT_PARTS = ("route", "dispatch", "experts", "combine")


def section(outcomes: Sequence[Outcome]) -> str:
    """What was measured and on what, the pairs of dispatchers, the parts of every run's step, and the cycle.

    Runs with overlap are among the steps also where there is no other dispatcher to pair them with.
    """
    pairs = pairings(outcomes)
    paired = [arm for pair in pairs for arm in (pair.first, pair.second)]
    overlapped = [arm for arm in arms_of(outcomes) if arm.steps.dispatch.overlap]
    arms = list({arm.repeated.name: arm for arm in (*paired, *overlapped)}.values())
    parts = [conditions(outcomes), *([_pairs(pairs), _legend(arms), _steps(arms)] if pairs else [])]
    cycles = [line for outcome in outcomes if outcome.result for line in cycle_lines(outcome.result)]
    return "\n\n".join([*parts, *map(wrapped, map(markdown_text, cycles))])


def _pairs(pairs: Sequence[Pairing]) -> str:
    header = ["layout", "micro-batch", "first", "ms", "second", "ms", "delta %", "faster by", "loss difference", "work"]
    return markdown(header, [_pair(pair) for pair in pairs])


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
        _named(arm),
        f"{1e3 * result.median_s:.1f}" if result.median_s else "",
        f"{result.tflops_per_gpu:.4g}" if result.tflops_per_gpu else "",
        f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else "",
        *(_shares(found, parts) if found is not None else [""] * (len(parts) + 1 + len(EXPERT_PARTS))),
    ]


def _named(arm: Arm) -> str:
    """`alltoall, overlap, delayed gradients`"""
    dispatch = arm.steps.dispatch
    settings = {"overlap": dispatch.overlap, "delayed gradients": dispatch.delay_wgrad}
    return ", ".join([arm.name, *(name for name, is_on in settings.items() if is_on)])


def _shares(found: Breakdown, parts: Sequence[str]) -> Iterator[str]:
    seconds = [*(found.parts_s.get(part) for part in parts), found.rest_s]
    both = ("forward", "backward")
    seconds += [sum(found.experts_s.get(f"{part} {way}", 0.0) for way in both) for part in EXPERT_PARTS]
    return ("" if each is None else f"{100 * each / found.seconds:.1f}" for each in seconds)
