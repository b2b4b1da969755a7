"""What refits that send changes sent: a table with a row for each share, memory, and the reasons of full refits."""

from __future__ import annotations

from collections.abc import Sequence

from refit import units
from refit.report.terminal.escaped import FILE_WIDTH
from refit.report.terminal.grid import Column, fitted
from refit.results.refit import EngineResult, RefitResult
from refit.results.shares import KindRow, ShareRow, full_refits, kind_rows, share_rows

MAX_REASONS = 3

COLUMNS = (
    Column("changed", "(%)"),
    Column("refits"),
    Column("median", "(ms)"),
    Column("speed", "(x full)"),
    Column("sent", "(MB)"),
    Column("bytes", "(% of full)"),
    Column("positions", "(MB)"),
    Column("values", "(MB)"),
    Column("find", "(ms)"),
    Column("pack", "(ms)"),
    Column("move", "(ms)"),
    Column("apply", "(ms)"),
)

KIND_COLUMNS = (
    Column("kind", is_text=True),
    Column("weights"),
    Column("changed", "(%)"),
    Column("least", "(%)"),
    Column("most", "(%)"),
)


def delta_lines(refit: RefitResult, width: int = FILE_WIDTH) -> list[str]:
    """The table, a line on memory and one on full refits, and a table of what optimizer steps changed; empty where no
    changes were sent."""
    rows, tested = share_rows(refit), refit.tested
    if not rows or tested is None:
        return []
    lines = ["Changes sent, by the share of the weights that had changed:"]
    lines.append(fitted(COLUMNS, [_cells(row) for row in rows], width))
    lines += [_full(refit), _snapshot(tested), *_reasons(tested)]
    kinds = kind_rows(refit)
    if kinds:
        lines.append("Changed by one optimizer step, by kind of tensor, of the source's weights:")
        lines.append(fitted(KIND_COLUMNS, [_kind_cells(kind) for kind in kinds], width))
    return [line for line in lines if line]


def delta_headline(refit: RefitResult) -> str:
    """`1.0 % changed, 2.1 % of the bytes, 31 x as fast as full in this run`, of the first share; empty without one.

    After optimizer steps `1.0 % changed by a step (experts 1.1, router 0.4), ...`.
    """
    rows = share_rows(refit)
    if not rows:
        return ""
    row = rows[0]
    parts = [f"{percent(row.changed_share)} % changed" if row.changed_share is not None else "everything sent"]
    if kinds := kind_rows(refit):
        parts[0] += f" by a step ({', '.join(f'{kind.kind} {percent(kind.mean)}' for kind in kinds[:-1])})"
    if row.byte_share is not None:
        parts.append(f"{percent(row.byte_share)} % of the bytes")
    if row.speedup is not None:
        parts.append(f"{ratio(row.speedup)} x as fast as full in this run")
    return ", ".join(parts)


def percent(share: float) -> str:
    """`0.35`, `1.0`, `28`: two digits, and no more than two decimals."""
    number = 100 * share
    if number >= 9.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 0.95 else f"{number:.2g}"


def ratio(number: float) -> str:
    """`31`, `3.4`, `0.82`."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"


def _cells(row: ShareRow) -> list[str]:
    milliseconds = (row.find_s, row.pack_s, row.move_s, row.apply_s)
    return [
        "all" if row.changed_share is None else percent(row.changed_share),
        f"{row.num_refits}",
        f"{1e3 * row.median_s:.2f}",
        "-" if row.speedup is None else ratio(row.speedup),
        f"{row.sent_bytes / 1e6:,.3f}",
        "-" if row.byte_share is None else percent(row.byte_share),
        f"{row.place_bytes / 1e6:,.3f}",
        f"{row.value_bytes / 1e6:,.3f}",
        *(f"{1e3 * seconds:.2f}" for seconds in milliseconds),
    ]


def _kind_cells(row: KindRow) -> list[str]:
    return [row.kind, f"{row.num_elements:,}", percent(row.mean), percent(row.least), percent(row.most)]


def _full(refit: RefitResult) -> str:
    full = full_refits(refit)
    if full is None or full.median_s is None or refit.plan is None:
        return ""
    return f"Full refit in this run: {1e3 * full.median_s:.2f} ms for {units.gb(refit.plan.wire_bytes)} between ranks"


def _snapshot(tested: EngineResult) -> str:
    most = max((sample.delta.snapshot_bytes for sample in tested.samples if sample.delta), default=0)
    return f"Snapshot of what was sent: {units.gb(most)} on the rank with most"


def _reasons(tested: EngineResult) -> Sequence[str]:
    """`Sent in full: 1 of 7 refits: rank 0: nothing was sent before`."""
    whole = [sample.delta for sample in tested.samples if sample.delta is not None and sample.delta.num_full]
    reasons = list(dict.fromkeys(delta.full_because for delta in whole if delta.full_because))
    if not whole:
        return []
    more = f"; and {len(reasons) - MAX_REASONS} more reasons" if len(reasons) > MAX_REASONS else ""
    return [f"Sent in full: {len(whole)} of {len(tested.samples)} refits: {'; '.join(reasons[:MAX_REASONS])}{more}"]
