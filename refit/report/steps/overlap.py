"""What overlap brings: pairs of runs that differ in it alone, of one dispatcher each, and a table of their times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from refit.report.refits.run_spread import beyond_text
from refit.report.steps.arms import Arm, arms_of, cell_of
from refit.report.steps.dispatchers import Pairing, judge
from refit.report.terminal.escaped import FILE_WIDTH
from refit.report.terminal.grid import Column, fitted
from refit.results.outcomes import Outcome

FIELDS = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
"""Fields of Megatron's configuration that overlap sets."""


def overlap_pairings(outcomes: Sequence[Outcome]) -> list[Pairing]:
    """Every arm with overlap beside the one without it, by layout, micro-batch and dispatcher."""
    cells: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms_of(outcomes):
        cells[cell_of(arm, overlap=False, delay_wgrad=False)].append(arm)
    found = []
    for arms in cells.values():
        without = next((arm for arm in arms if not arm.overlap), None)
        overlapped = [arm for arm in arms if arm.overlap]
        if without is not None:
            found += [Pairing(without, arm, judge(without, arm, FIELDS, "overlap")) for arm in overlapped]
    return sorted(found, key=_order)


def _order(pairing: Pairing) -> tuple[str, int, str, str]:
    second = pairing.second
    return second.where, second.steps.micro_batch_size, second.name, second.overlap


def overlap_text(outcomes: Sequence[Outcome], width: int = FILE_WIDTH) -> str:
    """The table of every pair, and under it why work is not equal where it is not; empty without a pair."""
    found = overlap_pairings(outcomes)
    if not found:
        return ""
    columns = [
        Column("layout", is_text=True),
        Column("micro-", "batch"),
        Column("dispatcher", is_text=True),
        Column("without", "(ms)"),
        Column("with", "(ms)"),
        Column("delta", "(%)"),
        Column("beyond", "spread", is_text=True),
        Column("loss", "difference"),
        Column("work", is_text=True),
        Column("with what", is_text=True),
    ]
    table = fitted(columns, [_row(pairing) for pairing in found], width)
    blocks = ["Overlap: mean training step, slowest rank", table]
    problems = "\n".join(_problem(pairing) for pairing in found if pairing.work.problems)
    return "\n\n".join([*blocks, *([problems] if problems else [])])


def _row(pairing: Pairing) -> list[str]:
    first, second, work, delta = pairing.first, pairing.second, pairing.work, pairing.delta
    return [
        second.where,
        str(second.steps.micro_batch_size),
        second.name,
        *(f"{1e3 * arm.mean_s:.2f}" for arm in (first, second)),
        "-" if delta is None else f"{100 * delta:+.1f}",
        "-" if delta is None else beyond_text(pairing.is_beyond_spread),
        "-" if work.loss_difference is None else f"{work.loss_difference:.1e}",
        "equal" if work.is_equal else "NOT EQUAL",
        second.overlap,
    ]


def _problem(pairing: Pairing) -> str:
    second = pairing.second
    cell = f"{second.where}, micro-batch {second.steps.micro_batch_size}, {second.name}, {second.overlap}"
    return f"{cell}: NOT EQUAL work: {'; '.join(pairing.work.problems)}"
