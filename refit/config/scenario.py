"""Scenario: the validated settings of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from refit.config.clusters import Cluster
from refit.config.delta import DeltaOptions
from refit.config.flag_names import size_flag
from refit.config.options import MethodOptions
from refit.config.registry import IDENTITY, MEASUREMENTS, OWN_ENGINE, encodings_of
from refit.config.relay import Relay
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.config.steps import StepSettings
from refit.errors import UsageError


class Mode(str, Enum):
    """Whether both models live on the same ranks or on disjoint ones."""

    COLLOCATED = "collocated"
    NON_COLLOCATED = "non-collocated"


class Verify(str, Enum):
    """How many destination elements are compared after each refit."""

    FULL = "full"
    SAMPLE = "sample"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Sending:
    """What is sent of what a destination will hold: a row of ENCODINGS, and its settings where it has any."""

    encoding: str = IDENTITY
    options: DeltaOptions | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Two sides of one model, what to measure and how to move the weights."""

    model: ModelShape | None
    """None where `model_provider` builds a model of its own."""
    source: SideSpec
    destination: SideSpec
    mode: Mode
    method: str
    """A name of the table `METHODS` in `refit.config.registry`."""
    engines: tuple[str, ...] = (OWN_ENGINE,)
    """Names of `ENGINES`."""
    measurements: tuple[str, ...] = ("refit",)
    """Names of `MEASUREMENTS`."""
    num_warmup: int = 2
    num_iterations: int = 5
    max_iterations: int | None = None
    """With `--repeat-until-stable`: the most that are timed."""
    verify: Verify = Verify.FULL
    check_forward: bool = False
    profile: bool = False
    staging_bytes: int = 512 << 20
    timeout_s: float = 300.0
    """Most that a phase may take."""
    model_name: str | None = None
    """The preset or file; None where flags describe the model."""
    model_provider: str | None = None
    """`module:function`."""
    output_dir: Path = Path("benchmark_results")
    recorded: dict[str, Any] = field(default_factory=dict)
    """Accepted flags that this run does not use (`--seq-length`, ...)."""
    notes: tuple[str, ...] = ()
    """Lines for the log on choices made for the user."""
    device: str | None = None
    """`cpu` or `cuda` where the user chose it; None uses the method's default."""
    ranks_per_gpu: int = 1
    """The most ranks that share a GPU (`refit.config.gpus`)."""
    method_options: dict[str, MethodOptions] = field(default_factory=dict)
    """Settings of the method by its name, of every method with some where `auto` chooses one; empty for one without
    any."""
    cluster: Cluster | None = None
    """The speeds that the refit's time is compared with; None where none was named."""
    run_name: str | None = None
    """Names the result file; None uses time and scenario."""
    steps: StepSettings | None = None
    """Settings of training steps and forward passes; None where neither is measured."""
    encoding: str = IDENTITY
    """The row of `ENCODINGS` that says what is sent of what the destination will hold."""
    delta: DeltaOptions | None = None
    """Its settings; None where it has none."""
    relay: Relay = Relay.OFF
    """Who passes weights on that several ranks need."""
    source_weights: Path | None = None
    """The folder of the checkpoint that fills the source."""
    write_weights: Path | None = None
    """Where what the destination holds is written as a checkpoint."""

    @property
    def own_options(self) -> MethodOptions | None:
        """The settings of its method; None for its defaults."""
        return self.method_options.get(self.method)

    @property
    def sending(self) -> Sending:
        return Sending(self.encoding, self.delta)

    @property
    def way(self) -> str:
        """How the bytes move, in words: the method, and what was chosen: `gloo with delta`, `gloo with relay node`."""
        chosen = [self.encoding] if self.encoding != IDENTITY else []
        chosen += [f"relay {self.relay.value}"] if self.relay is not Relay.OFF else []
        return f"{self.method} with {' and '.join(chosen)}" if chosen else self.method

    @property
    def encodings(self) -> list[str]:
        """The rows of ENCODINGS that its refits go through, in order: what the destination holds, then `encoding`."""
        return encodings_of(self.destination.held_dtype, self.encoding)

    @property
    def filled_with(self) -> str:
        """What the source holds where it was not trained, in words."""
        return str(self.source_weights) if self.source_weights is not None else "values by position"

    def trains(self, name: str) -> bool:
        """Whether the side called `name` is trained: the source, where a training step is measured."""
        return name == "source" and "train-step" in self.measurements

    @property
    def sends_steps(self) -> bool:
        """Whether what changes between refits is what optimizer steps change, not made up."""
        return self.delta is not None and self.trains("source")

    def steps_of(self, name: str) -> StepSettings | None:
        """The settings of the steps that the side called `name` runs; None where it is only refitted.

        A side that is not trained has no part in what only a backward pass has: recomputation and sequence parallelism.
        """
        if self.steps is None or self.trains(name):
            return self.steps
        if name == "destination" and "forward" not in self.measurements:
            return None
        return self.steps.forward_only

    @property
    def sides(self) -> dict[str, SideSpec]:
        """Both sides by the names that messages use."""
        return {"source": self.source, "destination": self.destination}

    @property
    def most_iterations(self) -> int:
        """The most refits that are timed."""
        return self.max_iterations or self.num_iterations

    @property
    def used_sides(self) -> tuple[str, ...]:
        """The sides that the measurements use. The others are not built."""
        # A result file may name a measurement of a later version.
        kinds = [MEASUREMENTS[kind] for kind in self.measurements if kind in MEASUREMENTS]
        used = {name for kind in kinds for name in kind.sides}
        return tuple(name for name in self.sides if name in used or not used)

    @property
    def num_ranks(self) -> int:
        """Number of ranks that take part: those of the sides that are used, with shared ranks counted once."""
        return max(self.sides[name].ranks.stop for name in self.used_sides)

    @property
    def title(self) -> str:
        """`TP2 EP2 -> TP2 EP1`; PP and ETP where they are not 1 and TP."""
        return f"{self.source.title} -> {self.destination.title}"

    @property
    def num_ranks_text(self) -> str:
        """`8 + 4 = 12`, in collocated mode `max(8, 4) = 8`."""
        if self.used_sides == ("source",):
            return str(self.source.world_size)
        return ranks_text(self.mode, self.source, self.destination)

    @property
    def model_title(self) -> str | None:
        """The preset or the provider; None where flags describe the model."""
        return self.model_name or self.model_provider


def ranks_text(mode: Mode, source: SideSpec, destination: SideSpec) -> str:
    """How many ranks the two sides need together, spelled out."""
    sizes = (source.world_size, destination.world_size)
    if mode is Mode.COLLOCATED:
        return f"max({sizes[0]}, {sizes[1]}) = {max(sizes)}"
    return f"{sizes[0]} + {sizes[1]} = {sum(sizes)}"


def check_num_ranks(scenario: Scenario, available: int, more: str = "") -> None:
    """Raise UsageError, with the sum spelled out and what to lower, where `available` ranks are too few.

    `more` says how to get as many as are needed, where the caller knows.
    """
    needed = scenario.num_ranks
    if needed <= available:
        return
    shared = scenario.ranks_per_gpu
    what = f"ranks ({shared} per GPU)" if shared > 1 else "GPUs"
    remedies = [f"lower {' or '.join(_flags_to_lower(scenario, available))}", more or f"start {needed} ranks"]
    if shared > 1:
        remedies.insert(1, "raise --ranks-per-gpu")
    raise UsageError(
        f"{scenario.num_ranks_text} {what} needed > {available} available: "
        f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
    )


def num_nodes(num_ranks: int, ranks_per_node: int) -> int:
    """The fewest nodes that suffice."""
    return math.ceil(num_ranks / ranks_per_node)


def _flags_to_lower(scenario: Scenario, available: int) -> list[str]:
    """The flags above 1 of the sides that are too large."""
    collocated = scenario.mode is Mode.COLLOCATED
    sides = {name: side for name, side in scenario.sides.items() if not collocated or side.world_size > available}
    return [size_flag(name, size) for name, side in sides.items() for size in _sizes_above_one(side)]


def _sizes_above_one(side: SideSpec) -> list[str]:
    layout = side.layout
    if layout.world_size != layout.tp * layout.ep * layout.pp:
        return ["world_size"]
    return [size for size in ("tp", "pp", "ep") if getattr(layout, size) > 1]
