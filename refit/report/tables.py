"""A run as one table with a row per scenario: Markdown for people, CSV for programs."""

from __future__ import annotations

from collections.abc import Sequence

from refit.config.side import SideSpec
from refit.report import neutral
from refit.report.grid import comma_separated, markdown
from refit.report.neutral import markdown_code
from refit.report.summary import counts_line, marked_ms
from refit.results.outcomes import Outcome
from refit.results.status import Status
from refit.results.sweep import Sweep

MARKDOWN_HEADER = (
    "scenario",
    "source",
    "target",
    "mode",
    "method",
    "status",
    "GPUs",
    "median (ms)",
    "min-max (ms)",
    "payload (GB)",
    "bottleneck (GB/s)",
    "lower bound (ms)",
    "share (%)",
    "#wrong",
    "Megatron-Core (ms)",
    "ratio",
)
MARKDOWN_NUM_TEXT = 6
"""Number of its columns that hold text, from the left."""

SIZES = ("tp", "ep", "etp", "pp", "world_size")


def markdown_text(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """A heading, the table, and the reason for each scenario that is not ok."""
    date = neutral.markdown_text(sweep.date)
    where = f"{sweep.nodes} node{'' if sweep.nodes == 1 else 's'}, {sweep.num_gpus} GPUs, {date}"
    reasons = [
        f"- {markdown_code(outcome.planned.name)} {outcome.status.text}: {neutral.markdown_text(outcome.reason or '')}"
        for outcome in outcomes
        if outcome.status is not Status.OK
    ]
    table = markdown(MARKDOWN_HEADER, [_markdown_row(outcome) for outcome in outcomes], MARKDOWN_NUM_TEXT)
    title = neutral.markdown_text(f"{f'{sweep.title} Refit Benchmark'.strip()} ({sweep.run_id})")
    parts = [f"### {title}", where, table, *(["\n".join(reasons)] if reasons else []), counts_line(outcomes)]
    return "\n\n".join(parts)


def _markdown_row(outcome: Outcome) -> list[str]:
    planned, tested, cost, bound = outcome.planned, outcome.tested, outcome.cost, outcome.bound
    summary = tested.summary if tested else None
    return [
        markdown_code(planned.name),
        _short(planned.source),
        _short(planned.destination),
        neutral.markdown_text(planned.mode),
        neutral.markdown_text(planned.method),
        outcome.status.text,
        str(planned.num_ranks),
        marked_ms(tested),
        f"{1e3 * summary.min_s:.2f}-{1e3 * summary.max_s:.2f}" if summary else "",
        f"{cost.payload_bytes / 1e9:.3f}" if cost else "",
        f"{tested.bottleneck_gb_per_s:.3f}" if tested and tested.bottleneck_gb_per_s is not None else "",
        f"{1e3 * bound.seconds:.4g}" if bound else "",
        f"{100 * outcome.share_of_bound:.1f}" if outcome.share_of_bound is not None else "",
        wrong_text(outcome),
        marked_ms(outcome.baseline),
        f"{outcome.baseline_ratio:.2f}" if outcome.baseline_ratio is not None else "",
    ]


def wrong_text(outcome: Outcome) -> str:
    """Elements found wrong, `unchecked` where refits ran but nothing was compared, nothing where none ran."""
    if outcome.tested is None or not outcome.tested.measured_s:
        return ""
    return f"{outcome.tested.num_wrong:,}" if outcome.tested.num_compared else "unchecked"


def _short(side: SideSpec | None) -> str:
    return f"{neutral.markdown_text(side.title)} ({side.world_size})" if side else ""


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """One row per scenario, figures unrounded in seconds and bytes. Missing values are blank."""
    rows = [_csv_row(outcome) for outcome in outcomes]
    header = rows[0].keys() if rows else ("name", "status")
    return comma_separated(tuple(header), [tuple(row.values()) for row in rows])


def _csv_row(outcome: Outcome) -> dict[str, object]:
    planned, tested, baseline = outcome.planned, outcome.tested, outcome.baseline
    cost, bound = outcome.cost, outcome.bound
    sides = (("source", planned.source), ("destination", planned.destination))
    summary = tested.summary if tested else None
    return {
        "name": planned.name,
        "status": outcome.status.value,
        "reason": outcome.reason,
        **{f"{name}_{size}": getattr(side.layout, size) if side else None for name, side in sides for size in SIZES},
        "mode": planned.mode,
        "method": planned.method,
        "num_ranks": planned.num_ranks,
        "nodes": planned.nodes,
        **{f"{name}_s": getattr(summary, f"{name}_s", None) for name in ("mean", "min", "max", "median")},
        "num_iterations": len(tested.measured_s) if tested else 0,
        **{f"{name}_bytes": getattr(cost, f"{name}_bytes", None) for name in ("payload", "wire", "local")},
        "busiest_bytes": cost.busiest.nbytes if cost else None,
        "busiest_rank": cost.busiest.rank if cost and cost.busiest.nbytes else None,
        "num_transfers": outcome.refit.plan.num_transfers if outcome.refit.plan else None,
        "bottleneck_gb_per_s": tested.bottleneck_gb_per_s if tested else None,
        "lower_bound_s": bound.seconds if bound else None,
        "limited_by": bound.limited_by if bound else None,
        "share_of_lower_bound": outcome.share_of_bound,
        "num_compared": tested.num_compared if tested else None,
        "num_wrong": tested.num_wrong if tested else None,
        "megatron_status": baseline.status.value if baseline else None,
        "megatron_median_s": baseline.median_s if baseline else None,
        "megatron_num_wrong": baseline.num_wrong if baseline else None,
        "megatron_ratio": outcome.baseline_ratio,
    }
