"""What a search is asked for, the pairs of layouts that it may plan, and why others are left out."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

from refit.cli.layout_text import layout_from_text
from refit.cli.parsing import parse
from refit.config.clusters import Cluster
from refit.config.registry import DEFAULT_FORMAT, FORMATS
from refit.config.relay import Relay
from refit.config.scenario import Mode, Scenario
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.findings import Kind, Objective, kind_of, value_of
from refit.predict.serving.cycle import Rollouts, Workload, largest_batch, rollouts
from refit.predict.serving.layout import Served
from refit.report.terminal import live
from refit.sweep.search_sides import Option, Sides, first_rank, side_flags


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair of layouts that fits. `flags` are its whole command line, less the refit method.

    `memory_bytes` are those of the fullest GPU that serves: weights, of both sides where they share it, and staging;
    what encodings need comes on top. `source_bytes` are those of a source that is searched too, `destination` is the
    other side's title. `floor_s` is a lower bound of the plan's lower bound: no plan was needed for it.
    `rollouts` are the bounds of serving, where they are asked for, and `train_s` that of a training step.
    """

    flags: tuple[str, ...]
    memory_bytes: int
    floor_s: float
    kind: Kind
    destination: str
    source_bytes: int = 0
    served: Served | None = None
    rollouts: Rollouts | None = None
    train_s: float = 0.0

    def value_floor(self, objective: Objective) -> float:
        """A lower bound of what `objective` ranks by."""
        return value_of(objective, self.floor_s, self.rollouts, self.train_s)


@dataclass(frozen=True, slots=True)
class Asked:
    """What to search. `common` flags stand in front of every candidate's own: model, mode and the like.

    `source` is the source's layout as text; None searches layouts of `source_gpus` ranks, in `source_formats`. A given
    source without `source_gpus` has TP x EP x PP ranks. `max_pp` is the largest pipeline size that is searched. Layouts
    serve `workload`, of which `objective` says what they are ranked by; None: only the refit is bounded. With `every`
    all that fit are planned, else those that may be the best.
    """

    common: tuple[str, ...]
    source: str | None
    source_gpus: int | None
    destination_gpus: int
    cluster: Cluster
    gpus_per_node: int
    source_formats: tuple[str, ...] = (DEFAULT_FORMAT,)
    destination_formats: tuple[str, ...] = (DEFAULT_FORMAT,)
    max_pp: int = 1
    max_plans: int = 400
    objective: Objective = Objective.REFIT
    workload: Workload | None = None
    every: bool = True

    def fits(self, memory_bytes: int) -> bool:
        return self.cluster.gpu_memory_bytes is None or memory_bytes <= self.cluster.gpu_memory_bytes

    def holds_batch(self, largest: int | None) -> bool:
        """Whether a layout whose cache has room for `largest` sequences serves the batch; None: that is not known."""
        return self.workload is None or largest is None or largest >= self.workload.batch

    def nothing_fits(self, num_built: int, least_bytes: float) -> str:
        return (
            f"none of {num_built} layouts fits: the smallest needs {least_bytes / 1e9:.1f} GB per GPU, "
            f"{self.cluster.name} has {(self.cluster.gpu_memory_bytes or 0) / 1e9:.1f} GB: raise --gpus"
        )

    def no_batch_fits(self, largest: int) -> str:
        assert self.workload is not None
        context = f"sequences of {self.workload.context:,} tokens"
        remedy = f"give --batch {largest} or less" if largest else "lower --context, or raise --gpus"
        return (
            f"--batch {self.workload.batch:,}: no layout has room for the cache of so many {context}, the largest "
            f"batch that fits is {largest:,}: {remedy}"
        )

    def fastest_link(self, source_ranks: int) -> float:
        """Bytes per second of the fastest link from any source rank to any rank of a destination behind them."""
        share_a_node = source_ranks % self.cluster.gpus_per_node
        inter = self.cluster.inter_bytes_per_s
        return self.cluster.intra_bytes_per_s if share_a_node or inter is None else inter


class Pairs:
    """The pairs of layouts of a search, and why others are left out."""

    def __init__(self, search: Asked) -> None:
        self._search, self._sides = search, Sides(search.common)
        self.num_built = self.num_too_large = self.num_batch_too_large = self.num_unbounded = 0
        self.kinds: Counter[Kind] = Counter()
        self.refused: dict[str, tuple[str, int]] = {}
        self._rollouts: dict[SideSpec, Rollouts] = {}
        self._formats: dict[tuple[str, str], str] = {}

    def fitting(self) -> list[Candidate]:
        """Raises UsageError, with the reason of the last refusal, where nothing can be built or fits."""
        search, scenario = self._search, self._sides.scenario
        assert scenario.model is not None
        if search.workload is not None:
            self._check_workload(search.workload, scenario)
        sources, destinations = self._options(scenario)
        found, refusal, least, largest = [], "", math.inf, 0
        for number, (source, destination) in enumerate(itertools.product(sources, destinations)):
            if number % 256 == 0:
                live.draw(f"looked at {number:,} of {len(sources) * len(destinations):,} layouts")
            reason = source.refusal or destination.refusal
            if reason:
                refusal = reason
                continue
            try:
                candidate = self._candidate(source, destination, scenario)
            except UsageError as error:
                refusal = str(error)
                continue
            self.num_built += 1
            least = min(least, max(candidate.memory_bytes, candidate.source_bytes))
            if not search.fits(max(candidate.memory_bytes, candidate.source_bytes)):
                self.num_too_large += 1
                continue
            if math.isinf(candidate.value_floor(search.objective)) and candidate.rollouts is not None:
                self.num_unbounded += 1
                continue
            batch = self._largest_batch(candidate, destination)
            largest = max(largest, batch or 0)
            if not search.holds_batch(batch):
                self.num_batch_too_large += 1
                continue
            self.kinds[candidate.kind] += 1
            found.append(candidate)
        if found:
            return found
        if self.num_batch_too_large:
            raise UsageError(search.no_batch_fits(largest))
        if self.num_unbounded:
            raise UsageError(
                f"cluster {search.cluster.name} has no inter_node_gb_per_s, and all {self.num_unbounded} layouts that "
                f"fit are on several nodes of {search.cluster.gpus_per_node} GPUs: add it to its file, or lower --gpus"
            )
        raise UsageError(
            search.nothing_fits(self.num_built, least) if self.num_built else refusal or "no layout has these sizes"
        )

    def _check_workload(self, workload: Workload, scenario: Scenario) -> None:
        assert scenario.model is not None
        workload.check(scenario.model)
        fp8 = ("fp8",) if scenario.destination.quantisation is not None else ()
        self._search.cluster.check_serves(("bf16", *fp8))

    def one(self, layout: str) -> tuple[Candidate, int | None]:
        """The candidate with this layout of the destination, and its largest batch. Raises UsageError."""
        search, scenario = self._search, self._sides.scenario
        assert scenario.model is not None
        assert search.source is not None
        assert search.workload is not None
        self._check_workload(search.workload, scenario)
        layers = self._sides.num_layers
        flags = layout_from_text("source", search.source, search.source_gpus, layers)
        source = self._sides.option("source", flags, 0)
        if source.spec is None:
            raise UsageError(source.refusal)
        flags = layout_from_text("destination", layout, search.destination_gpus, layers)
        destination = self._sides.option("destination", flags, first_rank(scenario.mode, source.spec))
        if destination.spec is None:
            raise UsageError(destination.refusal)
        if destination.spec.world_size != search.destination_gpus:
            raise UsageError(
                f"--explain {layout!r} is a layout of {destination.spec.world_size} GPUs, --gpus is "
                f"{search.destination_gpus}: give one of them otherwise"
            )
        if not FORMATS[destination.spec.format].serves:
            raise UsageError(f"--explain {layout!r}: {destination.spec.format} sides do not serve")
        candidate = self._candidate(source, destination, scenario)
        if math.isinf(candidate.value_floor(Objective.DECODE)):
            raise UsageError(
                f"cluster {search.cluster.name} has no inter_node_gb_per_s, and {layout} is on several nodes of "
                f"{search.cluster.gpus_per_node} GPUs: add it to its file, or lower --gpus"
            )
        return candidate, self._largest_batch(candidate, destination)

    def _options(self, scenario: Scenario) -> tuple[list[Option], list[Option]]:
        """Every layout of each side, whether it can be built or not."""
        search, layers = self._search, self._sides.num_layers
        if search.source is not None:
            flags = [layout_from_text("source", search.source, search.source_gpus, layers)]
        else:
            assert search.source_gpus is not None, "an open source needs its number of GPUs"
            flags = [*side_flags("source", search.source_formats, search.source_gpus, layers, search.max_pp)]
        sources = [self._sides.option("source", words, 0) for words in flags]
        known = next((each.spec for each in sources if each.spec is not None), scenario.source)
        first = first_rank(scenario.mode, known)
        formats, num_gpus = search.destination_formats, search.destination_gpus
        words = side_flags("destination", formats, num_gpus, layers, search.max_pp)
        return sources, [self._sides.option("destination", each, first) for each in words]

    def _candidate(self, source: Option, destination: Option, scenario: Scenario) -> Candidate:
        """Raises UsageError where the pair cannot be built."""
        search, workload = self._search, self._search.workload
        assert source.spec is not None
        assert destination.spec is not None
        shape = self._sides.shape(source.spec, destination.spec)
        flags = (*search.common, *source.flags, *destination.flags)
        held = self._sides.holding("source", source.spec, shape)
        try:
            wanted = self._sides.holding("destination", destination.spec, shape)
        except UsageError as error:
            self._refuse(destination.spec, str(error))
            raise
        self._check_formats(source.spec.format, destination.spec.format, flags)
        served, train_s = wanted.served, 0.0
        if workload is not None and served is not None:
            if destination.spec not in self._rollouts:
                self._rollouts[destination.spec] = rollouts(shape, destination.spec, served, search.cluster, workload)
            train_s = workload.train_bound_s(shape, source.spec.world_size, search.cluster)
        mine, theirs = held.bytes_by_rank, wanted.bytes_by_rank
        memory, floor_s = max(theirs), 0.0
        # Which ranks meet on a GPU is for the plan: this is the least of one. Changes have no floor either.
        if scenario.ranks_per_gpu == 1 and scenario.mode is Mode.COLLOCATED:
            memory = max(one + other for one, other in itertools.zip_longest(mine, theirs, fillvalue=0))
        elif scenario.ranks_per_gpu == 1 and scenario.relay is not Relay.OFF:
            # A rank may get a part from another rank of its node, so that fewer bytes leave the source.
            floor_s = memory / (search.cluster.intra_bytes_per_s + (search.cluster.inter_bytes_per_s or 0.0))
        elif scenario.ranks_per_gpu == 1:
            # Every byte of a destination on GPUs of its own arrives over a link, and some source sent it.
            floor_s = max(memory, sum(theirs) / len(mine)) / search.fastest_link(len(mine))
        return Candidate(
            flags=flags,
            memory_bytes=memory + scenario.staging_bytes,
            floor_s=floor_s * (scenario.delta is None),
            kind=kind_of(source.spec.title, destination.spec.title, destination.spec.layout),
            destination=destination.spec.title,
            source_bytes=max(mine) + scenario.staging_bytes if search.source is None else 0,
            served=served,
            rollouts=self._rollouts.get(destination.spec),
            train_s=train_s,
        )

    def _check_formats(self, source: str, destination: str, flags: tuple[str, ...]) -> None:
        """Raise UsageError for flags that these two formats together do not have: read whole, once for two formats."""
        if (source, destination) not in self._formats:
            try:
                parse([*flags, "--dry-run"])
                self._formats[source, destination] = ""
            except UsageError as error:
                self._formats[source, destination] = str(error)
        if reason := self._formats[source, destination]:
            raise UsageError(reason)

    def _largest_batch(self, candidate: Candidate, destination: Option) -> int | None:
        """With the memory that is known without a plan."""
        search, shape = self._search, self._sides.scenario.model
        if search.workload is None or search.cluster.gpu_memory_bytes is None or candidate.served is None:
            return None
        assert shape is not None
        assert destination.spec is not None
        room = search.cluster.gpu_memory_bytes - candidate.memory_bytes
        return largest_batch(shape, destination.spec, candidate.served, room, search.workload.context)

    def _refuse(self, side: SideSpec, reason: str) -> None:
        """Count a layout that its format cannot have, by the rule: the reason without its numbers."""
        rule = f"{side.format} {re.sub(r'[0-9]+', 'N', reason.partition(':')[2])}"
        first, count = self.refused.get(rule, (f"{side.format}{reason.partition(':')[2]}", 0))
        self.refused[rule] = (first, count + 1)
