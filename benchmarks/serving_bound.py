"""Decode steps of a running vLLM beside their lower bounds, and prefill beside that of `--measure forward`:

    python -m refit calibrate --nproc-per-node 2 --output here.yaml
    python -m benchmarks.serving_bound --engine-python ENVIRONMENT/bin/python --cluster here.yaml --device cpu
    python -m benchmarks.serving_bound --engine-python ENVIRONMENT/bin/python --cluster h200_nvlink

The engine has a cache of its own, and decodes whole batches at the stated context. Each row is a model, a batch and a
context: the median of the steps, the bound that `refit search` ranks by, and how many times the bound it took. No row
is left out; one that fails is a row too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.cli.parsing import parse
from refit.config.clusters import Cluster, load_cluster
from refit.config.registry import FORMATS, load
from refit.config.scenario import Scenario
from refit.errors import RefitError
from refit.models.vllm.engine.process import ON_DEVICE, EngineProcess, model_folder
from refit.models.vllm.engine.side import config_of, settings_of
from refit.predict.serving.roofline import PassBound, Serving
from refit.report.plans.answer import limit
from refit.report.terminal.grid import markdown

NUM_STEPS = 16
MARGIN = 256
"""Tokens beyond the context that a sequence may become."""

GPU_SHARE = 0.9
"""Of a GPU's memory that the engine alone has."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model as flags, and the batches and contexts that it decodes."""

    name: str
    flags: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


WIDE = ("--num-layers", "4", "--hidden-size", "1024", "--num-attention-heads", "8", "--num-query-groups", "4")
WIDE += ("--kv-channels", "128", "--ffn-hidden-size", "4096", "--vocab-size", "32000")
EIGHT_LAYERS = ("--num-layers", "8")
CASES = {
    "cpu": (
        Case("qwen3, 4 layers of 1024", ("--model", "tiny_qwen3", *WIDE), ((1, 128), (4, 128), (8, 512))),
        Case(
            "qwen3_moe, 4 layers of 1024, 16 experts",
            ("--model", "tiny_qwen3_moe", *WIDE, "--num-experts", "16", "--moe-ffn-hidden-size", "1024"),
            ((1, 128), (4, 128), (8, 512)),
        ),
    ),
    "cuda": (
        Case("llama3_8b", ("--model", "llama3_8b"), ((1, 1024), (32, 1024), (128, 2048))),
        Case(
            "qwen3_30b_a3b, 8 layers", ("--model", "qwen3_30b_a3b", *EIGHT_LAYERS), ((1, 1024), (32, 1024), (128, 2048))
        ),
        Case("qwen3_32b, 8 layers", ("--model", "qwen3_32b", *EIGHT_LAYERS), ((8, 4096), (64, 4096))),
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One decode step: `seconds` is None where it failed, for the `reason`."""

    case: str
    batch: int
    context: int
    bound: PassBound
    seconds: float | None
    reason: str = ""

    @property
    def cells(self) -> list[str]:
        measured = "-" if self.seconds is None else f"{1e3 * self.seconds:,.3g}"
        ratio = self.reason if self.seconds is None else f"{self.seconds / self.bound.seconds:.2f}"
        figures = (self.batch, self.context, measured, f"{1e3 * self.bound.seconds:,.3g}", ratio, limit(self.bound))
        return [self.case, *map(str, figures)]


HEADER = ("model", "batch", "context", "decode step (ms)", "bound (ms)", "measured / bound", "of the bound")


def decoded(case: Case, python: Path, cluster: Cluster, device: str) -> Iterator[Row]:
    """The rows of one model. It has an engine of its own."""
    most = max(context for _, context in case.shapes) + MARGIN
    flags = (*case.flags, "--max-position-embeddings", str(max(most, 4096)), "--source=TP1", "--destination=vllm TP1")
    scenario: Scenario = parse([*flags, "--dry-run"]).scenario
    shape, side = scenario.model, scenario.destination
    assert shape is not None
    assert side.dtype is not None
    serving = Serving(shape, side.dtype, load(FORMATS[side.format].serving or "")(shape, side), cluster)
    bounds = {work: serving.decode(*work) for work in case.shapes}
    process = None
    try:
        with model_folder(json.dumps(config_of(shape, side))) as folder:
            settings = settings_of(shape, side, folder, device) | own_settings(case, most, device)
            process = EngineProcess(python, settings, ON_DEVICE[device])
        for (batch, context), bound in bounds.items():
            prompts = prompts_of(shape.vocab_size, batch, context)
            try:
                steps: list[float] = process.ask("decode", prompts=prompts, num_steps=NUM_STEPS)
                yield Row(case.name, batch, context, bound, statistics.median(steps))
            except RefitError as error:
                yield Row(case.name, batch, context, bound, None, str(error))
    except RefitError as error:
        yield from (Row(case.name, *work, bound, None, str(error)) for work, bound in bounds.items())
    finally:
        if process is not None:
            process.close()


def own_settings(case: Case, most_tokens: int, device: str) -> dict[str, Any]:
    """Settings of the engine's cache and batches beyond those of a refit."""
    batches = sorted({batch for batch, _ in case.shapes})
    settings: dict[str, Any] = {"max_model_len": most_tokens, "max_num_seqs": max(batches)}
    settings["enable_prefix_caching"] = False
    if device == "cuda":
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches}
        settings |= {"gpu_memory_utilization": GPU_SHARE, "compilation_config": graphs}
    return settings


def prompts_of(vocab_size: int, batch: int, context: int) -> list[list[int]]:
    """Prompts whose sequences have `context` tokens in the middle of the measured steps."""
    drawn = random.Random(0)
    length = max(1, context - NUM_STEPS // 2)
    return [[drawn.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    return markdown(HEADER, [row.cells for row in rows])


def main() -> int:
    """Measure, print the table, and write it where asked. Returns 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", type=Path, required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--cluster", required=True, help="speeds of the machine; refit calibrate writes them")
    parser.add_argument("--device", choices=sorted(CASES), default="cuda", help="where the engine computes")
    parser.add_argument("--output", type=Path, help="a file for the table; default: none")
    args = parser.parse_args()
    cluster = load_cluster(args.cluster)
    cluster.check_serves(("bf16",))
    rows: list[Row] = []
    for case in CASES[args.device]:
        for row in decoded(case, args.engine_python, cluster, args.device):
            rows.append(row)
            print(" | ".join(row.cells), flush=True)
    print(f"\n{table(rows)}", flush=True)
    if args.output is not None:
        args.output.write_text(table(rows) + "\n", encoding="utf-8")
    return int(any(row.seconds is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
