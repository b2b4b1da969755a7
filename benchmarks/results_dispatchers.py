"""Token dispatchers as docs/performance.md shows them: both arms of each cell, the parts of their steps, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.results_text import conditions, wrapped
from refit.report.arms import Arm, StepRun
from refit.report.cycle import cycle_lines
from refit.report.dispatchers import Pairing, faster_by, pairings
from refit.report.grid import markdown
from refit.report.neutral import markdown_text
from refit.results.outcomes import Outcome
from refit.results.step import Breakdown

TOP_PARTS = ("forward", "backward", "gradient sync", "optimizer")
EXPERT_PARTS = ("route", "dispatch", "experts", "combine")


def section(outcomes: Sequence[Outcome]) -> str:
    """What was measured and on what, the pairs of dispatchers, the parts of every run's step, and the cycle."""
    pairs = pairings(outcomes)
    arms = list({arm.repeated.name: arm for pair in pairs for arm in (pair.first, pair.second)}.values())
    parts = [conditions(outcomes), *([_pairs(pairs), _legend(pairs), _steps(arms)] if pairs else [])]
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


def _legend(pairs: Sequence[Pairing]) -> str:
    """What the figures are of, for all pairs."""
    steps = [arm.steps for pair in pairs for arm in (pair.first, pair.second)]
    batches = sorted({f"{each.global_batch_size} sequences of {each.seq_length:,} tokens" for each in steps})
    balanced = {each.dispatch.balanced for each in steps}
    routing = (
        "forced balanced" if balanced == {True} else "in some cells forced balanced" if True in balanced else "free"
    )
    return wrapped(
        f"Mean training step of the slowest rank, {' and '.join(batches)}, routing {routing}. Below: where the time of "
        "one recorded step goes, in % of it; the last four of forward and backward together, on the rank where they "
        "take longest."
    )


def _steps(arms: Sequence[Arm]) -> str:
    header = ["layout", "micro-batch", "dispatcher", "median ms", "TFLOP/s per GPU", "peak GiB"]
    return markdown([*header, *TOP_PARTS, "rest", *EXPERT_PARTS], [_step(arm, run) for arm in arms for run in arm.runs])


def _step(arm: Arm, run: StepRun) -> list[str]:
    result, found = run.result, run.result.breakdown
    return [
        markdown_text(arm.where),
        str(arm.steps.micro_batch_size),
        arm.name,
        f"{1e3 * result.median_s:.1f}" if result.median_s else "",
        f"{result.tflops_per_gpu:.4g}" if result.tflops_per_gpu else "",
        f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else "",
        *(_shares(found) if found is not None else [""] * (len(TOP_PARTS) + 1 + len(EXPERT_PARTS))),
    ]


def _shares(found: Breakdown) -> Iterator[str]:
    seconds = [found.parts_s.get(part, 0.0) for part in TOP_PARTS] + [found.rest_s]
    both = ("forward", "backward")
    seconds += [sum(found.experts_s.get(f"{part} {way}", 0.0) for way in both) for part in EXPERT_PARTS]
    return (f"{100 * each / found.seconds:.1f}" for each in seconds)
