"""The lines on checkpoints: what was loaded, how fast beside a plain read, what was written and what of it is right."""

from __future__ import annotations

from refit import units
from refit.config.registry import LOAD
from refit.report.terminal.escaped import plain_lines
from refit.results.checkpoints import LoadResult, WriteResult
from refit.results.result import Result


def loaded(result: LoadResult) -> str:
    """Two lines: the time and rate of loading beside the plain read, and what the ranks read and took for it."""
    read, held = sum(result.read_bytes_per_rank), sum(result.weights_bytes_per_rank)
    most = max(zip(result.read_bytes_per_rank, result.weights_bytes_per_rank, strict=True), default=(0, 0))
    extra = max((each for each in result.extra_memory_bytes_per_rank if each is not None), default=None)
    memory = f", at most {units.gib(extra)} of memory beside the weights" if extra is not None else ""
    return plain_lines(
        [
            f"Loaded {result.folder}: {units.gb(result.nbytes)} in {result.num_tensors:,} tensors of "
            f"{result.num_files:,} files in {units.seconds(result.seconds)} = "
            f"{units.three_digits(result.gb_per_s)} GB/s{_cold(result.cold_share)}; a plain read of the files "
            f"{units.three_digits(result.raw_gb_per_s)} GB/s{_cold(result.raw_cold_share)}",
            f"Ranks read {units.gb(read)} to fill {units.gb(held)}, at most {units.gb(most[0])} to fill "
            f"{units.gb(most[1])} on one{memory}",
        ]
    )


def closing_lines(result: LoadResult, run: Result) -> list[str]:
    """The last lines of a log: the cold start again, where it stands beside a refit."""
    refit = run.refit
    median = refit.tested.median_s if refit is not None and refit.tested is not None else None
    beside = f", {result.seconds / median:.3g} x the median refit of {units.seconds(median)}" if median else ""
    return [
        f"Cold start from {result.folder}: {units.seconds(result.seconds)} to fill the source "
        f"({units.three_digits(result.gb_per_s)} GB/s, a plain read {units.three_digits(result.raw_gb_per_s)} GB/s)"
        f"{beside}"
    ]


def summary_lines(run: Result) -> list[str]:
    """What a run read and wrote, for summaries and reports; nothing of a run without checkpoints."""
    found = run.measurements.get(LOAD)
    lines = closing_lines(found, run) if isinstance(found, LoadResult) else []
    tested = run.refit.tested if run.refit is not None else None
    return lines + (written(tested.written).split("\n") if tested is not None and tested.written is not None else [])


def written(result: WriteResult) -> str:
    """What was written, and the verdict on the files."""
    lines = [
        f"Written {result.folder}: {units.gb(result.nbytes)} in {result.num_tensors:,} tensors of {result.num_files:,} "
        f"files in {units.seconds(result.seconds)}"
    ]
    if result.compared_with is None:
        lines.append(f"UNVERIFIED ({result.folder}): --verify off, the files were not compared")
    else:
        outcome = "FAILED" if result.fault else "PASSED"
        lines.append(
            f"{outcome} ({result.folder}): {result.num_compared:,} elements read again and compared with "
            f"{result.compared_with}, bit for bit, {result.num_wrong:,} differ"
        )
    lines += [f"  {each.key}: {each.num_wrong:,} differ, first {each.first}" for each in result.wrong]
    return plain_lines(lines)


def _cold(share: float | None) -> str:
    if share is None:
        return " (whether from the page cache is not known here)"
    return " (none of it in the page cache)" if share == 1 else f" ({100 * (1 - share):.0f} % of it in the page cache)"
