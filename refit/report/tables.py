"""A run as one table with a row per scenario: Markdown for people, CSV for programs."""

from __future__ import annotations

from collections.abc import Sequence

from refit.config.layout import short_text
from refit.report.grid import comma_separated, markdown
from refit.report.summary import STATUS_TEXTS, counts_line
from refit.results.outcomes import Figures, Outcome
from refit.results.sweep import Side, Sweep

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
"""How many of its columns hold text."""

SIZES = ("tp", "ep", "etp", "pp", "world_size")


def markdown_text(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """A heading, the table, and the reasons of what has no times."""
    where = f"{sweep.nodes} node{'' if sweep.nodes == 1 else 's'}, {sweep.num_gpus} GPUs, {sweep.date}"
    reasons = [
        f"- `{outcome.planned.name}` {STATUS_TEXTS[outcome.status]}: {outcome.reason}"
        for outcome in outcomes
        if outcome.status != "ok"
    ]
    table = markdown(MARKDOWN_HEADER, [_markdown_row(outcome) for outcome in outcomes], MARKDOWN_NUM_TEXT)
    title = f"### {f'{sweep.title} Refit Benchmark'.strip()} ({sweep.run_id})"
    parts = [title, where, table, *(["\n".join(reasons)] if reasons else []), counts_line(outcomes)]
    return "\n\n".join(parts)


def _markdown_row(outcome: Outcome) -> list[str]:
    planned, figures = outcome.planned, outcome.figures
    engine, moved = figures.engine, figures.moved
    spread = f"{1e3 * engine.min_s:.2f}-{1e3 * engine.max_s:.2f}" if engine and engine.min_s and engine.max_s else ""
    return [
        f"`{planned.name}`",
        _short(planned.source),
        _short(planned.destination),
        planned.mode,
        planned.method,
        STATUS_TEXTS[outcome.status],
        str(planned.num_ranks),
        _milliseconds(figures.median_s),
        spread,
        f"{moved.payload / 1e9:.3f}" if moved else "",
        f"{engine.gb_per_s:.3f}" if engine and engine.gb_per_s is not None else "",
        f"{1e3 * figures.lower_bound_s:.4g}" if figures.lower_bound_s is not None else "",
        f"{100 * figures.share:.1f}" if figures.share is not None else "",
        wrong_text(figures),
        _milliseconds(figures.peer.median_s if figures.peer else None),
        f"{figures.peer_ratio:.2f}" if figures.peer_ratio is not None else "",
    ]


def wrong_text(figures: Figures) -> str:
    """Elements found wrong, `unchecked` where refits ran but nothing was compared, nothing where none ran."""
    if figures.engine is None or not figures.engine.samples_s:
        return ""
    return f"{figures.engine.num_wrong:,}" if figures.engine.num_compared else "unchecked"


def _short(side: Side | None) -> str:
    if side is None:
        return ""
    return f"{short_text(side)} ({side.world_size})"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """One row per scenario, figures unrounded in seconds and bytes; an empty cell is a figure there is not."""
    rows = [_csv_row(outcome) for outcome in outcomes]
    header = rows[0].keys() if rows else ("name", "status")
    return comma_separated(tuple(header), [tuple(row.values()) for row in rows])


def _csv_row(outcome: Outcome) -> dict[str, object]:
    planned, figures = outcome.planned, outcome.figures
    engine, peer, moved = figures.engine, figures.peer, figures.moved
    sides = (("source", planned.source), ("destination", planned.destination))
    return {
        "name": planned.name,
        "status": outcome.status,
        "reason": outcome.reason,
        **{f"{name}_{size}": getattr(side, size, None) for name, side in sides for size in SIZES},
        "mode": planned.mode,
        "method": planned.method,
        "num_ranks": planned.num_ranks,
        "nodes": planned.nodes,
        **{f"{name}_s": getattr(engine, f"{name}_s", None) for name in ("mean", "min", "max", "median")},
        "num_iterations": len(engine.samples_s) if engine else 0,
        **{f"{name}_bytes": getattr(moved, name, None) for name in ("payload", "wire", "local", "busiest")},
        "busiest_rank": getattr(moved, "busiest_rank", None),
        "num_transfers": figures.num_transfers,
        "bottleneck_gb_per_s": getattr(engine, "gb_per_s", None),
        "lower_bound_s": figures.lower_bound_s,
        "limited_by": figures.limited_by,
        "share_of_lower_bound": figures.share,
        "num_compared": getattr(engine, "num_compared", None),
        "num_wrong": getattr(engine, "num_wrong", None),
        "megatron_status": getattr(peer, "status", None),
        "megatron_median_s": getattr(peer, "median_s", None),
        "megatron_num_wrong": getattr(peer, "num_wrong", None),
        "megatron_ratio": figures.peer_ratio,
    }
