"""Random pairs of layouts from a seed that all can run: formats, dtypes, modes and models in turn, sizes by chance."""

from __future__ import annotations

import itertools
import random
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from refit.cli.layout_text import layout_flags
from refit.cli.parsing import parse
from refit.config.registry import FORMATS
from refit.config.scenario import Mode, Scenario
from refit.errors import RefitError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.fsdp2 import Fsdp2Options
from refit.predict.vllm.options import VllmOptions

MODELS = (
    "--model tiny_qwen3_moe --num-layers 4 --kv-channels 128 --moe-ffn-hidden-size 256",
    "--model tiny_deepseek_v3 --q-lora-rank 128 --kv-lora-rank 128",
)
"""Small, with blocks of 128 x 128 in most matrices. The second has latent attention, a dense layer, shared experts."""

DTYPES = ("bf16", "fp8-block", "mxfp8")
PLACES = ("auto", "source", "destination")
NUM_LAYERS = 4
SIZES = {1: 1, 2: 3, 3: 1, 4: 6, 5: 1, 6: 3, 7: 1, 8: 8}
"""Ranks of a side, and how often they are drawn: mostly those that divide in several ways."""

OFTEN = [("megatron", "megatron"), ("megatron", "vllm")]
"""Formats of source and destination that come twice as often as others: they differ in most axes."""

MAX_TRIES = 60
"""Sizes that are drawn for one combination before it is given up: most that cannot be built are cut blocks of FP8."""


@dataclass(frozen=True, slots=True)
class Layouts:
    """One refit: its name, which can stand in file names, and its flags, less the method."""

    name: str
    flags: tuple[str, ...]


def formats_here() -> tuple[list[str], list[str]]:
    """The formats of sources and of destinations whose libraries are installed."""
    here = [
        name for name, row in FORMATS.items() if all(find_spec(library) is not None for library, _ in row.libraries)
    ]
    return [name for name in here if not FORMATS[name].destination_only], here


def random_layouts(number: int, max_ranks: int, seed: int) -> list[Layouts]:
    """`number` different refits, or fewer where `max_ranks` ranks have no more.

    They are equal for equal arguments and libraries. Combinations of formats, dtype, mode and model follow one another
    in an order of their own, so that the first few already differ in all of them.
    """
    draw = random.Random(seed)
    formats = [*itertools.product(*formats_here()), *OFTEN]
    combinations = list(itertools.product(formats, DTYPES, Mode, MODELS))
    draw.shuffle(combinations)
    found: dict[tuple[str, ...], str] = {}
    fruitless = 0
    for combination in itertools.cycle(combinations):
        if len(found) == number or fruitless > len(combinations):
            break
        one = _drawn(draw, max_ranks, found.keys(), *combination)
        fruitless = 0 if one else fruitless + 1
        if one is not None:
            flags, scenario = one
            found[flags] = _name(len(found), scenario)
    return [Layouts(name, flags) for flags, name in found.items()]


def _drawn(
    draw: random.Random,
    max_ranks: int,
    taken: Iterable[tuple[str, ...]],
    formats: tuple[str, str],
    dtype: str,
    mode: Mode,
    model: str,
) -> tuple[tuple[str, ...], Scenario] | None:
    """Flags of sizes that can run and are not `taken`; None where MAX_TRIES found none."""
    for _ in range(MAX_TRIES):
        is_shared = mode is Mode.COLLOCATED
        first = _num_ranks(draw, max_ranks if is_shared else max_ranks - 1)
        second = _num_ranks(draw, max_ranks if is_shared else max_ranks - first)
        flags = (
            *shlex.split(model),
            *_side(draw, "source", formats[0], first),
            *_side(draw, "destination", formats[1], second),
            f"--refit-mode={mode.value}",
            f"--rl-inference-dtype={dtype}",
            *([f"--quantise={draw.choice(PLACES)}"] if dtype != "bf16" else []),
        )
        try:
            scenario = parse([*flags, "--dry-run"]).scenario
            dry_run(scenario, DryRunOptions())
        except RefitError:
            continue
        if flags not in taken:
            return flags, scenario
    return None


def _side(draw: random.Random, side: str, name: str, num_ranks: int) -> Sequence[str]:
    """The flags of one side of `num_ranks` ranks. ETP is TP half of the time, and vLLM has several engines as often."""
    engines = _divisor(draw, num_ranks) if name == "vllm" and draw.random() < 0.5 else 1
    tp = _divisor(draw, num_ranks // engines)
    pp = _divisor(draw, num_ranks // engines // tp)
    sizes: Mapping[str, int] = {"tp": tp}
    if name == "megatron":
        sizes = {"tp": tp, "pp": pp, "ep": _divisor(draw, num_ranks // pp)}
        sizes |= {"etp": _divisor(draw, num_ranks // pp // sizes["ep"])} if draw.random() < 0.5 else {}
    elif name == "fsdp2":
        replicas = _divisor(draw, num_ranks // tp)
        sizes = {"tp": tp, "replicate_size": replicas, "ep": _divisor(draw, num_ranks // replicas)}
    elif name == "vllm":
        data_parallel = num_ranks // engines // tp // pp
        sizes = {"tp": tp, "pp": pp, "data_parallel_size": data_parallel, "replicas": engines}
        sizes |= {"ep": draw.choice((1, tp * data_parallel))}
    return layout_flags(side, name, sizes, num_ranks, NUM_LAYERS)


def _num_ranks(draw: random.Random, most: int) -> int:
    sizes = [size for size in SIZES if size <= most]
    return draw.choices(sizes, [SIZES[size] for size in sizes])[0]


def _divisor(draw: random.Random, number: int) -> int:
    """A divisor of `number`, 1 less often than others."""
    return draw.choice([1, *([size for size in range(2, number + 1) if number % size == 0] * 2)])


def _name(number: int, scenario: Scenario) -> str:
    mode = "shared" if scenario.mode is Mode.COLLOCATED else "apart"
    words = re.sub(r"[^a-z0-9-]+", "_", f"{scenario.title.replace('->', 'to')} {mode}".lower())
    return f"{number:02d}_{words.strip('_')}"


def coverage(scenarios: Sequence[Scenario]) -> str:
    """How many of these refits have what, in one line."""
    counts: Counter[str] = Counter()
    for one in scenarios:
        before, after = one.source.layout, one.destination.layout
        counts[f"{one.source.format} to {one.destination.format}"] += 1
        counts[one.destination.quantisation.dtype if one.destination.quantisation else "bf16"] += 1
        counts[one.mode.value] += 1
        for axis in ("tp", "pp", "ep", "etp"):
            counts[f"another {axis.upper()}"] += getattr(before, axis) != getattr(after, axis)
        counts["DP"] += before.dp > 1 or after.dp > 1
        counts["several engines"] += (
            isinstance(one.destination.options, VllmOptions) and one.destination.options.replicas > 1
        )
        counts["HSDP"] += any(
            isinstance(side.options, Fsdp2Options) and side.options.replicate_size > 1 for side in one.sides.values()
        )
    return ", ".join(f"{what} {count}" for what, count in counts.items())
