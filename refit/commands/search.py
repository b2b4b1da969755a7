"""`refit search`: which layouts fit, and what serving with each, and the refit into it, take at least."""

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
from refit.config.routing import UNIFORM, read_routing
from refit.config.scenario import Mode
from refit.errors import UsageError
from refit.predict.findings import Found, Objective
from refit.predict.serving.cycle import Workload
from refit.report.plans import search as text
from refit.report.plans.explain import explained
from refit.report.plans.search_page import as_html
from refit.report.terminal import live
from refit.report.terminal.console import show, show_aside
from refit.sweep.search import Search
from refit.sweep.search_scenarios import scenario_file
from refit.sweep.search_sides import positions_of

RENDERERS = {"text": text.as_text, "csv": text.as_csv, "json": text.as_json, "html": as_html}
BATCH_OF_A_GPU, CONTEXT = 8, 4096
"""Defaults of what is served."""

GPUS_PER_HOST = 8
"""Ranks of a host, by which the planner prefers replicas nearby; the dry run's default."""

SEARCHED = tuple(name for name, form in FORMATS.items() if form.serves)


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "search",
        help="find the engine layout with the shortest cycle, decode step or refit, by lower bounds",
        description="Rank the layouts of the destination that fit the cluster's memory by lower bounds: of a cycle of "
        "training, refit and rollouts, of a decode step, or of the refit. Shown are those that no other beats in both "
        "that and memory. Nothing is run.",
        epilog="Flags of benchmark_refit.py may follow after --.\n\nexamples:\n"
        "  refit search --model kimi_k2 --source 'TP8 EP8 PP4' --gpus 64 --cluster h100_ib400\n"
        "  refit search --model kimi_k2 --source 'TP8 EP8' --gpus 64 --cluster h100_ib400 --explain 'vllm TP8 EP64'",
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
    parser.add_argument(
        "--objective",
        choices=[objective.value for objective in Objective],
        default=Objective.CYCLE.value,
        help="what layouts are ranked by; default: cycle",
    )
    parser.add_argument(
        "--explain", metavar="LAYOUT", help="print every term of one layout, as in 'vllm TP8 EP64'; default: a search"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="all layouts that fit, as --write-scenarios takes them; default: those that may be best",
    )
    _add_workload_flags(parser)
    parser.add_argument("--max-pp", type=positive, default=1, metavar="N", help="largest PP searched; default: 1")
    parser.add_argument(
        "--max-plans",
        type=positive,
        default=400,
        metavar="N",
        help="most layouts that are planned; others are counted, with the bound that none of them beats; default: 400",
    )
    parser.add_argument("--format", choices=RENDERERS, default="text", help="of the output; default: text")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="rows of the text; default: 20")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what ranks against memory; default: not drawn")
    parser.add_argument(
        "--write-scenarios", type=Path, metavar="FILE", help="write the best as a list for sweeps; default: none"
    )
    parser.add_argument("--best", type=positive, default=7, metavar="N", help="scenarios written; default: 7")
    parser.set_defaults(run=run, takes_flags=True)


WORKLOAD = ("batch", "context", "prompt", "rollout_tokens", "train_step", "routing", "explain")
"""Flags that say what is served."""


def _add_workload_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is served")
    tokens = flag_types.up_to(limits.MAX_SIZE)
    group.add_argument(
        "--batch",
        type=flag_types.positive,
        metavar="N",
        help=f"sequences that decode at a time, on all engines together; default: {BATCH_OF_A_GPU} for each GPU",
    )
    group.add_argument(
        "--context",
        type=tokens,
        metavar="N",
        help=f"tokens of a sequence in the cache, on average; default: {CONTEXT:,}, or 2/3 of the model's positions",
    )
    group.add_argument("--prompt", type=tokens, metavar="N", help="tokens of a prompt; default: half of the context")
    group.add_argument(
        "--rollout-tokens",
        type=flag_types.up_to(limits.MAX_RECORDED),
        metavar="N",
        help="tokens decoded in a cycle; default: those of one batch, 2 x (context - prompt) a sequence",
    )
    group.add_argument(
        "--train-step",
        type=flag_types.seconds,
        metavar="SECONDS",
        help="seconds of a cycle's training; default: a bound, its operations at full speed",
    )
    group.add_argument(
        "--routing",
        type=read_routing,
        metavar="FILE",
        help="JSON: tokens by layer and expert, as SGLang's logical_count; default: all experts as likely",
    )


def _workload(args: argparse.Namespace) -> Workload | None:
    """What is served; None where the refit alone is asked for. Raises UsageError for flags without use."""
    if args.objective == Objective.REFIT.value:
        given = next((name for name in WORKLOAD if getattr(args, name) is not None), None)
        if given is not None:
            raise UsageError(
                f"--{given.replace('_', '-')} is about serving, which --objective refit leaves out: give --objective "
                "decode or cycle"
            )
        return None
    model = (f"--model={args.model}",) if args.model else ()
    positions = positions_of((*model, *args.flags))
    context = args.context or min(CONTEXT, max(1, 2 * positions // 3))
    batch = args.batch or BATCH_OF_A_GPU * args.gpus
    prompt = args.prompt or max(1, context // 2)
    answered = 2 * max(1, context - prompt)
    tokens = args.rollout_tokens or batch * answered
    return Workload(batch, context, prompt, tokens, args.train_step, args.routing or UNIFORM)


def run(args: argparse.Namespace) -> int:
    """Search and print. Raises UsageError where nothing fits, or for flags that are no layout."""
    live.draw("reading the model")
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
        objective=Objective(args.objective),
        workload=_workload(args),
        every=args.all or args.write_scenarios is not None,
    )
    if args.explain is not None:
        show(explained(search.explain(args.explain), cluster))
        return 0
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
