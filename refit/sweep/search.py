"""Searches layouts: the ways to shard both sides that fit the GPUs, ranked by the bound of what is asked for.

1. `Sides` reads the layouts of each side, and what their ranks hold: every combination of the sizes that its format
   searches.
2. `candidates` keeps the pairs that can be built and that fit the cluster's memory, with their bounds of serving. Each
   has a floor below the refit's bound, found without a plan.
3. `Search.run` plans the pairs with the lowest floors first. A pair is left out where one that was planned has as
   little memory, and a bound no higher than this pair's floor: no plan of it could be better. That leaves the Pareto
   set as it is (a test compares it with that of all plans).
4. Those that do not fit with what encodings need, which the plan says, are left out. What was left out is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from refit.cli.parsing import parse
from refit.config.relay import Relay
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.findings import Findings, Found, Objective
from refit.predict.kv_cache import kv_bytes_per_token
from refit.predict.relays import NothingToRelay
from refit.predict.serving.cycle import largest_batch
from refit.report.terminal import live
from refit.sweep.parallel import plan_all
from refit.sweep.search_pairs import Asked, Candidate, Pairs

RELAY_FLAG = "--refit-relay"


@dataclass(frozen=True, slots=True)
class Search(Asked):
    """A search that is asked for, and how it is carried out."""

    def run(self) -> Findings:
        """Search. A terminal shows how many layouts are looked at and planned.

        Raises UsageError, with the reason of the last refusal (the smallest sizes), where nothing can be built or fits.
        """
        live.draw("reading the layouts")
        pairs = Pairs(self)
        fitting = sorted(pairs.fitting(), key=lambda one: (one.value_floor(self.objective), one.memory_bytes))
        if self.every:
            left = fitting[self.max_plans :]
            every = plan_all(fitting[: self.max_plans], self.plan)
        else:
            every, left = self._best_first(fitting)
        self._check_bounds(every)
        found = [one for one in every if self.fits(one.memory_bytes)]
        if not found:
            raise UsageError(self.nothing_fits(pairs.num_built, min(one.memory_bytes for one in every)))
        small = [one for one in found if self.holds_batch(one.largest_batch)]
        if not small:
            raise UsageError(self.no_batch_fits(max(one.largest_batch or 0 for one in found)))
        small.sort(key=lambda one: (one.value(self.objective), one.busiest.nbytes, one.memory_bytes))
        return Findings(
            found=tuple(small),
            num_built=pairs.num_built,
            num_too_large=pairs.num_too_large + len(every) - len(found),
            num_unplanned=len(left),
            unplanned_floor_s=left[0].value_floor(self.objective) if left else None,
            objective=self.objective,
            every=self.every,
            num_batch_too_large=pairs.num_batch_too_large + len(found) - len(small),
            num_unbounded=pairs.num_unbounded,
            num_beaten=len(fitting) - len(every) - len(left),
            kinds=pairs.kinds,
            refused=pairs.refused,
        )

    def explain(self, layout: str) -> Found:
        """Plan one layout of the destination, as text. Raises UsageError where it cannot be built, is too large for the
        cluster, or cannot hold the batch."""
        if self.source is None:
            raise UsageError("--explain is about one pair of layouts: give the source's with --source")
        candidate, batch = Pairs(self).one(layout)
        if not self.fits(candidate.memory_bytes):
            raise UsageError(self.nothing_fits(1, candidate.memory_bytes))
        if not self.holds_batch(batch):
            raise UsageError(self.no_batch_fits(batch or 0))
        return self.plan(candidate)

    def _best_first(self, fitting: Sequence[Candidate]) -> tuple[list[Found], list[Candidate]]:
        """Plan candidates, the lowest floors first, but for those that cannot be better than what was planned. Returns
        what was planned, and what was not since there would be too many plans."""
        found: list[Found] = []
        left, front = [], _Front(self.objective, is_open=self.source is None)
        for number, candidate in enumerate(fitting):
            if front.beats(candidate):
                continue
            if len(found) == self.max_plans:
                left.append(candidate)
                continue
            live.draw(f"planned {len(found)} layouts, looking at {number + 1:,} of {len(fitting):,}")
            found.append(self.plan(candidate))
            self._check_bounds(found[-1:])
            if self.fits(found[-1].memory_bytes) and self.holds_batch(found[-1].largest_batch):
                front.add(found[-1])
        return found, left

    def _check_bounds(self, found: Sequence[Found]) -> None:
        """Raise UsageError where a cycle is asked for, and a refit of it has no bound."""
        none = next((one for one in found if one.bound is None), None)
        if self.objective is Objective.CYCLE and none is not None:
            raise UsageError(
                f"no refit has a bound: cluster {self.cluster.name} has no speed between nodes of "
                f"{self.cluster.gpus_per_node} GPUs, and {none.source_ranks + none.destination_ranks} GPUs are on "
                "several: give --refit-mode collocated, fewer GPUs, or --objective decode"
            )

    def plan(self, candidate: Candidate) -> Found:
        """Plan one candidate; without the relay that is asked for where it has nothing to relay."""
        flags, scenario = candidate.flags, parse([*candidate.flags, "--dry-run"]).scenario
        options = DryRunOptions(None, self.gpus_per_node, self.cluster, alone=True)
        try:
            run = dry_run(scenario, options)
        except NothingToRelay:
            flags = (*flags, f"{RELAY_FLAG}={Relay.OFF.value}")
            run = dry_run(replace(scenario, relay=Relay.OFF), options)
        room = tokens = batch = None
        held, side = run.held_bytes, scenario.destination
        memory = max(held.get("both", held.get("destination", {})).values()) + run.staging_bytes
        if self.cluster.gpu_memory_bytes is not None:
            room = self.cluster.gpu_memory_bytes - memory
            per_token = kv_bytes_per_token(run.model, side.layout)
            tokens = room // per_token if per_token else None  # no layer has attention
            if self.workload is not None and candidate.served is not None:
                batch = largest_batch(run.model, side, candidate.served, room, self.workload.context)
        return Found(
            flags=flags,
            source=scenario.source.title,
            destination=side.title,
            source_ranks=scenario.source.world_size,
            destination_ranks=side.world_size,
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
            layout=side.layout,
            rollouts=candidate.rollouts,
            train_s=candidate.train_s,
            largest_batch=batch,
        )


class _Front:
    """What was planned of a search. Of one source, layouts that may be equal to one of these are not beaten, since rows
    say which are equal; with many sources they are. The second best is wanted too: with many sources, that of another
    destination."""

    def __init__(self, objective: Objective, *, is_open: bool) -> None:
        self._objective, self._is_open = objective, is_open
        self._points: list[tuple[float, int]] = []
        self._best: tuple[float, object] = (math.inf, None)
        self._second_s = math.inf

    def add(self, found: Found) -> None:
        value = found.value(self._objective)
        self._points.append((value, found.memory_bytes))
        key: object = found.destination if self._is_open else f"{value:.4g}"
        best_s, best_key = self._best
        if value < best_s:
            self._second_s = best_s if key != best_key else self._second_s
            self._best = value, key
        elif key != best_key:
            self._second_s = min(self._second_s, value)

    def beats(self, candidate: Candidate) -> bool:
        """Whether one of these is as good in both the objective and memory, whatever the plan of `candidate`."""
        floor, memory = candidate.value_floor(self._objective), candidate.memory_bytes
        is_best = self._is_open and candidate.destination == self._best[1]
        if self._second_s > floor and not is_best:
            return False
        points = (point for point in self._points if point[0] <= floor and point[1] <= memory)
        return any(self._is_open or point != (floor, memory) for point in points)
