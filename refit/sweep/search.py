"""Searches layouts: the ways to shard both sides that fit the GPUs, ranked by the lower bound of their refit.

1. `side_flags` lists a side's layouts as flags: every combination of the sizes that its format searches.
2. `candidates` keeps the pairs that can be built and that fit the cluster's memory. Each has a floor below its bound,
   found without a plan.
3. `Search.run` plans the pairs with the lowest floors and sorts them by bound. Those that do not fit with what
   encodings need, which the plan says, are left out. What was left out is counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from refit.cli.layout_text import layout_flags, layout_from_text
from refit.cli.parsing import parse
from refit.config.clusters import Cluster
from refit.config.registry import FORMATS
from refit.config.relay import Relay
from refit.config.scenario import Mode, Scenario
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.findings import Findings, Found
from refit.predict.kv_cache import kv_bytes_per_token
from refit.predict.relays import NothingToRelay
from refit.predict.sides import predict_side
from refit.sweep.parallel import plan_all

RELAY_FLAG = "--refit-relay"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair of layouts that fits. `flags` are its whole command line, less the refit method.

    `memory_bytes` are those of the fullest GPU that serves: weights, of both sides where they share it, and staging;
    what encodings need comes on top. `floor_s` is a lower bound of the plan's lower bound: no plan was needed for it.
    """

    flags: tuple[str, ...]
    memory_bytes: int
    floor_s: float


@dataclass(frozen=True, slots=True)
class Search:
    """What to search. `common` flags stand in front of every candidate's own: model, mode and the like.

    `source` is the source's layout as text; None searches layouts of `source_gpus` ranks, in `source_formats`. A given
    source without `source_gpus` has TP x EP x PP ranks. `max_pp` is the largest pipeline size that is searched.
    """

    common: tuple[str, ...]
    source: str | None
    source_gpus: int | None
    destination_gpus: int
    cluster: Cluster
    gpus_per_node: int
    source_formats: tuple[str, ...] = ("megatron",)
    destination_formats: tuple[str, ...] = ("megatron",)
    max_pp: int = 1
    max_plans: int = 400

    def run(self) -> Findings:
        """Search. A terminal shows how many layouts are planned.

        Raises UsageError, with the reason of the last refusal (the smallest sizes), where nothing can be built or fits.
        """
        fitting, num_built, refusal = self._fitting()
        if not fitting:
            raise UsageError(refusal)
        fitting.sort(key=lambda candidate: (candidate.floor_s, candidate.memory_bytes))
        planned, left = fitting[: self.max_plans], fitting[self.max_plans :]
        every = plan_all(planned, self.plan)
        found = [one for one in every if self._fits(one.memory_bytes)]
        if not found:
            raise UsageError(self._nothing_fits(num_built, min(one.memory_bytes for one in every)))
        found.sort(key=lambda one: (one.bound_s, one.busiest.nbytes, one.memory_bytes))
        return Findings(
            found=tuple(found),
            num_built=num_built,
            num_too_large=num_built - len(found) - len(left),
            num_unplanned=len(left),
            unplanned_floor_s=left[0].floor_s if left else None,
        )

    def plan(self, candidate: Candidate) -> Found:
        """Plan one candidate; without the relay that is asked for where it has nothing to relay."""
        flags, scenario = candidate.flags, parse([*candidate.flags, "--dry-run"]).scenario
        options = DryRunOptions(None, self.gpus_per_node, self.cluster)
        try:
            run = dry_run(scenario, options)
        except NothingToRelay:
            flags = (*flags, f"{RELAY_FLAG}={Relay.OFF.value}")
            run = dry_run(replace(scenario, relay=Relay.OFF), options)
        room = tokens = None
        held = run.held_bytes
        memory = max(held.get("both", held.get("destination", {})).values()) + run.staging_bytes
        if self.cluster.gpu_memory_bytes is not None:
            room = self.cluster.gpu_memory_bytes - memory
            tokens = room // kv_bytes_per_token(run.model, scenario.destination.layout)
        return Found(
            flags=flags,
            source=scenario.source.title,
            destination=scenario.destination.title,
            source_ranks=scenario.source.world_size,
            destination_ranks=scenario.destination.world_size,
            payload_bytes=run.cost.payload_bytes,
            wire_bytes=run.cost.wire_bytes,
            busiest=run.cost.busiest,
            sender_imbalance=run.cost.sender_imbalance,
            memory_bytes=memory,
            kv_room_bytes=room,
            kv_tokens=tokens,
            bound=run.changes[0].bound if run.changes else run.bound,
            share=run.changes[0].share if run.changes else None,
            floor=run.floor,
            crossing=run.crossing,
        )

    def _fitting(self) -> tuple[list[Candidate], int, str]:
        """The candidates that fit, the number of pairs that can be built, and why nothing is left."""
        sources, destinations = self._sides()
        held: dict[tuple[str, ...], dict[int, int]] = {}
        fitting, num_built, refusal, least = [], 0, "", math.inf
        for source, destination in itertools.product(sources, destinations):
            flags = (*self.common, *source, *destination)
            try:
                scenario = parse([*flags, "--dry-run"]).scenario
            except UsageError as error:
                refusal = str(error)
                continue
            assert scenario.model is not None, "the command refuses model providers"
            num_built += 1
            for name, own in (("source", source), ("destination", destination)):
                if own not in held:
                    sharding = predict_side(scenario.model, scenario.sides[name])
                    held[own] = dict(sharding.bytes_per_rank)
            candidate = self._candidate(flags, scenario, list(held[source].values()), list(held[destination].values()))
            least = min(least, candidate.memory_bytes)
            if self._fits(candidate.memory_bytes):
                fitting.append(candidate)
        if num_built:
            refusal = self._nothing_fits(num_built, least)
        return fitting, num_built, refusal or "no layout has these sizes"

    def _fits(self, memory_bytes: int) -> bool:
        return self.cluster.gpu_memory_bytes is None or memory_bytes <= self.cluster.gpu_memory_bytes

    def _nothing_fits(self, num_built: int, least_bytes: float) -> str:
        return (
            f"none of {num_built} layouts fits: the smallest needs {least_bytes / 1e9:.1f} GB per GPU, "
            f"{self.cluster.name} has {(self.cluster.gpu_memory_bytes or 0) / 1e9:.1f} GB: raise --gpus"
        )

    def _fastest_link(self, source_ranks: int) -> float:
        """Bytes per second of the fastest link from any source rank to any rank of a destination behind them."""
        share_a_node = source_ranks % self.cluster.gpus_per_node
        inter = self.cluster.inter_bytes_per_s
        return self.cluster.intra_bytes_per_s if share_a_node or inter is None else inter

    def _sides(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """The flags of every layout of each side, whether it can be built or not."""
        model = parse([*self.common, "--dry-run"]).scenario.model
        if model is None:
            raise UsageError("a search predicts the models that flags describe: leave --model-provider out")
        layers = model.num_layers
        if self.source is not None:
            sources = [layout_from_text("source", self.source, self.source_gpus, layers)]
        else:
            assert self.source_gpus is not None, "an open source needs its number of GPUs"
            sources = list(side_flags("source", self.source_formats, self.source_gpus, layers, self.max_pp))
        formats, num_gpus = self.destination_formats, self.destination_gpus
        return sources, list(side_flags("destination", formats, num_gpus, layers, self.max_pp))

    def _candidate(
        self, flags: tuple[str, ...], scenario: Scenario, source: list[int], destination: list[int]
    ) -> Candidate:
        memory, floor_s = max(destination), 0.0
        # Which ranks meet on a GPU is for the plan: this is the least of one. Changes have no floor either.
        if scenario.ranks_per_gpu > 1:
            return Candidate(flags, memory + scenario.staging_bytes, floor_s)
        if scenario.mode is Mode.COLLOCATED:
            pairs = itertools.zip_longest(source, destination, fillvalue=0)
            memory = max(mine + other for mine, other in pairs)
        elif scenario.relay is not Relay.OFF:
            # A rank may get a part from another rank of its node, so that fewer bytes leave the source.
            floor_s = max(destination) / (self.cluster.intra_bytes_per_s + (self.cluster.inter_bytes_per_s or 0.0))
            floor_s *= scenario.delta is None
        else:
            # Every byte of a destination on GPUs of its own arrives over a link, and some source sent it.
            floor_s = max(max(destination), sum(destination) / len(source)) / self._fastest_link(len(source))
            floor_s *= scenario.delta is None
        return Candidate(flags, memory + scenario.staging_bytes, floor_s)


def side_flags(
    side: str, formats: Iterable[str], num_gpus: int, num_layers: int, max_pp: int
) -> Iterator[tuple[str, ...]]:
    """The flags of every layout of `num_gpus` ranks, in each format: all sizes that divide them.

    Whether the model can be sharded so is not checked. The order decides between layouts that are equally good: sizes
    come largest first, so that experts are kept whole (EP before ETP).
    """
    divisors = [size for size in range(num_gpus, 0, -1) if num_gpus % size == 0]
    for name in formats:
        searched = (*FORMATS[name].axes, *(FORMATS[name].searched_options if side == "destination" else ()))
        axes = [[size for size in divisors if axis != "pp" or size <= max_pp] for axis in searched]
        for values in itertools.product(*axes):
            yield layout_flags(side, name, dict(zip(searched, values, strict=True)), num_gpus, num_layers)
