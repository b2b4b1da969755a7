"""`refit search`: which layouts fit, and the lower bound of the refit into each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refit.cli import flag_types
from refit.cli.invocation import command_text
from refit.config import limits
from refit.config.clusters import load_cluster
from refit.config.registry import FORMATS
from refit.config.scenario import Mode
from refit.errors import UsageError
from refit.predict.findings import Found
from refit.report.plans import search as text
from refit.report.terminal.console import show, show_aside
from refit.sweep.search import Search
from refit.sweep.search_scenarios import scenario_file

RENDERERS = {"text": text.as_text, "csv": text.as_csv, "json": text.as_json}
GPUS_PER_HOST = 8
"""Ranks of a host, by which the planner prefers replicas nearby; the dry run's default."""

SEARCHED = tuple(name for name, form in FORMATS.items() if form.serves)


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "search",
        help="find the layouts that fit and rank them by the refit's lower bound",
        description="Plan the refit into every layout of the destination that fits the cluster's memory, and rank them "
        "by lower bound. Marked with * are those that no other beats in both lower bound and memory. Nothing is run.",
        epilog="Flags of benchmark_refit.py may follow after --.\n\nexample:\n"
        "  refit search --model kimi_k2 --source 'TP8 EP8 PP4' --gpus 64 --cluster h100_ib400",
    )
    positive = flag_types.up_to(limits.MAX_COUNT)
    parser.add_argument("--model", metavar="NAME", help="a preset of configs/models; default: flags after --")
    parser.add_argument("--source", metavar="LAYOUT", help="as in 'TP8 EP8 PP4'; default: searched too")
    parser.add_argument(
        "--source-gpus",
        type=positive,
        metavar="N",
        help="ranks of the source; default: TP x EP x PP, or the fewest for its ETP",
    )
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="ranks of the destination; required")
    parser.add_argument(
        "--refit-mode",
        choices=[mode.value for mode in Mode],
        default=Mode.NON_COLLOCATED.value,
        help="whether both sides share GPUs; default: non-collocated",
    )
    parser.add_argument(
        "--cluster", required=True, metavar="NAME", help="a file of configs/clusters, or a YAML file; required"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=SEARCHED, default=SEARCHED, help="the destination's formats; default: all"
    )
    parser.add_argument("--max-pp", type=positive, default=1, metavar="N", help="largest PP searched; default: 1")
    parser.add_argument(
        "--max-plans", type=positive, default=400, metavar="N", help="most layouts that are planned; default: 400"
    )
    parser.add_argument("--format", choices=RENDERERS, default="text", help="of the output; default: text")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="rows of the text; default: 20")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw lower bound against memory; default: not drawn")
    parser.add_argument(
        "--write-scenarios", type=Path, metavar="FILE", help="write the best as a list for sweeps; default: none"
    )
    parser.add_argument("--best", type=positive, default=7, metavar="N", help="scenarios written; default: 7")
    parser.set_defaults(run=run, takes_flags=True)


def run(args: argparse.Namespace) -> int:
    """Search and print. Raises UsageError where nothing fits, or for flags that are no layout."""
    if args.source is None and args.source_gpus is None:
        raise UsageError("no source: give its layout with --source, or its ranks with --source-gpus to search that too")
    cluster = load_cluster(args.cluster)
    model = (f"--model={args.model}",) if args.model else ()
    search = Search(
        common=(*model, f"--refit-mode={args.refit_mode}", *args.flags),
        source=args.source,
        source_gpus=args.source_gpus,
        destination_gpus=args.gpus,
        cluster=cluster,
        gpus_per_node=min(cluster.gpus_per_node, GPUS_PER_HOST),
        destination_formats=tuple(args.formats),
        max_pp=args.max_pp,
        max_plans=args.max_plans,
    )
    findings = search.run()
    show(RENDERERS[args.format](findings, cluster, args.top))
    if args.plot is not None:
        from refit.report.plots.search_picture import draw

        show_aside(f"drawn: {draw(findings, cluster, args.plot)}")
    if args.write_scenarios is not None:
        args.write_scenarios.write_text(scenario_file(findings.found[: args.best], args.model), encoding="utf-8")
        for line in _next_steps(args, findings.found[: args.best]):
            show_aside(line)
    return 0


def _next_steps(args: argparse.Namespace, found: Sequence[Found]) -> list[str]:
    """Whole commands that plan and run what was written, on as many GPUs as the largest scenario needs."""
    path = args.write_scenarios
    chosen = ["--scenarios", str(path), "--cluster", args.cluster]
    collocated = args.refit_mode == Mode.COLLOCATED.value
    needed = max(
        max(one.source_ranks, one.destination_ranks) if collocated else one.source_ranks + one.destination_ranks
        for one in found
    )
    per_node = min(load_cluster(args.cluster).gpus_per_node, GPUS_PER_HOST)
    nodes = -(-needed // per_node)
    gpus = ["--num-gpus", str(nodes * per_node), "--gpus-per-node", str(per_node)]
    results = ["--output-dir", f"benchmark_results/{path.stem}"]
    return [
        f"written: {path}: {len(found)} scenarios, the largest on {needed} GPUs ({nodes} node{'s' * (nodes > 1)})",
        f"plan them: {command_text(['sweep', 'plan', *chosen, *gpus])}",
        f"run them in an allocation: {command_text(['sweep', 'run', *chosen, *gpus, *results])}",
    ]
