"""A list of scenarios, run by the loop of `refit sweep run`: their table, and their results as files.

A cell that fails or hangs does not stop the others. Logs and results are in `<output-dir>/logs`, and
`refit report <output-dir>/logs` reads them. `<output-dir>/<MACHINE>_<PART>.jsonl` holds the results of a part
(`refit.results.collection`), in the form that docs/results keeps and `docs.tables` reads.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.listed import opened, result_of
from refit.report.refits.headline import between, title
from refit.results.collection import COLLECTION_SUFFIX, write_collection
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult, speed_ratio
from refit.results.result import Result
from refit.results.runs import outcome_of
from refit.results.status import Status
from refit.sweep.selection import Candidate, Selection

TIMEOUT_S = 120
"""Of a cell; half of it of a phase."""

APART, TOGETHER = "non-collocated", "collocated"


@dataclass(frozen=True, slots=True)
class Cell:
    """One scenario of the matrix: its part, its name, and its flags of `benchmark_refit.py`."""

    part: str
    name: str
    flags: tuple[str, ...]
    num_ranks: int

    @property
    def slug(self) -> str:
        """Its name in file names and in collections."""
        return "_".join(self.name.replace("->", "to").lower().split())


@dataclass(frozen=True, slots=True)
class Sizes:
    """TP, EP and ETP of one side."""

    tp: int
    ep: int
    etp: int = 1

    def flags(self, prefix: str) -> str:
        etp = "expert-tensor-model-parallel-size" if prefix else "expert-tensor-parallel-size"
        return (
            f"--{prefix}tensor-model-parallel-size {self.tp} --{prefix}expert-model-parallel-size {self.ep} "
            f"--{prefix}{etp} {self.etp}"
        )


def cell(part: str, source: Sizes, destination: Sizes, mode: str, method: str, *extra: str, label: str = "") -> Cell:
    name = f"{part} TP{source.tp} EP{source.ep} -> TP{destination.tp} EP{destination.ep}"
    if (source.etp, destination.etp) != (1, 1):
        name += f" ETP{source.etp} -> {destination.etp}"
    flags = [
        source.flags(""),
        destination.flags("rl-inference-"),
        f"--refit-mode {mode} --refit-method {method}",
        *extra,
    ]
    sizes = (source.tp * source.ep, destination.tp * destination.ep)
    num_ranks = max(sizes) if mode == "collocated" else sum(sizes)
    return Cell(part, f"{name} {mode} {method} {label}".strip(), tuple(shlex.split(" ".join(flags))), num_ranks)


def chosen(cells: Iterable[Cell], args: argparse.Namespace) -> list[Cell]:
    """The cells that `--only` and `--match` leave, with the flags that follow `--`."""
    found = [one for one in cells if args.match in one.name and (args.only is None or one.part in args.only)]
    return [replace(one, flags=(*one.flags, *args.flags)) for one in found]


def add_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Arguments of every matrix."""
    parser.add_argument("--only", action="append", help="parts to run; may be given several times")
    parser.add_argument("--match", default="", help="run only cells whose name contains this")
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument(
        "--write-list", type=Path, metavar="FILE", help="write the cells for refit sweep run --scenarios FILE, and stop"
    )
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir))
    parser.add_argument("flags", nargs="*", help="flags for every cell, after --")


def selection(cells: Iterable[Cell], machine: str) -> Selection:
    """The list of cells."""
    flags = (f"--timeout={TIMEOUT_S // 2}",)
    return Selection(f"{machine} matrix", tuple(Candidate(one.slug, (*one.flags, *flags)) for one in cells))


def run_all(cells: Sequence[Cell], directory: Path, machine: str, num_gpus: int | None = None) -> int:
    """Run cells, on `num_gpus` GPUs or on CPUs; print their table and keep their results.

    Returns 0 if every cell was right or waived, else 1. The collections are up to date after every cell.
    """
    by_name = {one.slug: one for one in cells}
    parts: dict[str, list[Result]] = {}
    lines = [HEADER]
    with opened(selection(cells, machine), directory / "logs", num_gpus=num_gpus, timeout_s=TIMEOUT_S) as loop:
        refused = [planned for planned in loop.sweep.scenarios if planned.status is not Status.READY]
        ran = (planned for planned, _ in loop.each(loop.pending("unfinished")))
        for planned in itertools.chain(refused, ran):
            one = by_name[planned.name]
            result = replace(result_of(planned, loop.directory, loop.sweep.run_id), run_id=one.slug)
            lines.append(row(one, result))
            print(lines[-1], flush=True)
            parts.setdefault(one.part, []).append(result)
            write_collection(directory / f"{machine}_{one.part}{COLLECTION_SUFFIX}", parts[one.part])
    table = "\n".join(lines)
    (directory / "table.txt").write_text(table + "\n")
    results = list(itertools.chain.from_iterable(parts.values()))
    failed = sum(result.status not in (Status.OK, Status.WAIVED) for result in results)
    print(f"\n{table}\n\n{len(results) - failed} of {len(results)} cells right or waived")
    return 1 if failed else 0


def row(one: Cell, result: Result) -> str:
    """One line of the table: ms (medians), the plan's lower bound, GB/s of the busiest rank, wrong elements, then every
    baseline's median, wrong elements and ratio.

    `cold` is planning, preparing and the first refit; `extra` the most device memory beyond both models.
    """
    measured = result.refit
    if measured is None or measured.tested is None:
        reason = result.failure or "no engine ran"
        return f"{one.name:<{NAME_WIDTH}} {result.status.text:>8}  {reason}"
    tested = measured.tested
    extra = [nbytes for nbytes in tested.extra_memory_bytes_per_rank if nbytes is not None]
    figures = [
        _text(tested.median_s, 1e3),
        _text(measured.bound.seconds if measured.bound else None, 1e3),
        _text(tested.bottleneck_gb_per_s, 1),
        _text(tested.cold_total_s if tested.cold_s else None, 1e3),
        _text(tested.connect_s, 1e3),
        _text(max(extra, default=None), 2**-20),
        _wrong(tested),
    ]
    padded = " ".join(f"{text:>{width}}" for text, width in zip(figures, WIDTHS, strict=True))
    outcome = outcome_of(one.name, result)
    baselines = "; ".join(_baseline(outcome, name, tested) for name in measured.baselines)
    return f"{one.name:<{NAME_WIDTH}} {padded}  {result.status.text}  {baselines}".rstrip()


def _baseline(outcome: Outcome, name: str, tested: EngineResult) -> str:
    engine = outcome.refit.baselines[name]
    ratio, ways = speed_ratio(tested, engine), between(outcome, name)
    shown = f", {ratio:.2f} x as long" if ratio else ", partial" if engine.not_moved else ""
    shown += f" ({ways})" if ratio and ways else ""
    over = outcome.transport_of(name)
    return f"{title(name)} over {over} {_text(engine.median_s, 1e3)} ms, wrong {_wrong(engine)}{shown}"


def _text(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.1f}"


def _wrong(engine: EngineResult) -> str:
    return f"{engine.num_wrong:,}" if engine.samples else engine.status.value


NAME_WIDTH = 72
TITLES = ("ms", "bound ms", "GB/s", "cold ms", "connect", "extra MiB", "#wrong")
WIDTHS = (8, 8, 7, 8, 8, 9, 9)
HEADER = (
    f"{'cell':<{NAME_WIDTH}} "
    + " ".join(f"{title:>{width}}" for title, width in zip(TITLES, WIDTHS, strict=True))
    + "  status, baselines"
)
