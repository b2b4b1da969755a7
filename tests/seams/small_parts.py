"""One small extension for each registry: a side of plain tensors, an engine, a measurement.

The transport over a queue is that of examples/plugin.py.

Each is what a developer would write in one file. The tests register them and run scenarios with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.config.rows import Engine, MeasurementKind
from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.errors import RefitError
from refit.memory.weights import LocalShard, LocalWeights
from refit.models.forward_pass import ForwardPass
from refit.models.sharded_model import WithoutSteps
from refit.plan.box import Box
from refit.predict.sides import PlannedSides
from refit.results.result import Result
from refit.results.status import Status
from refit.transport.base import Program, RunReport
from refit.transport.ranks import Ranks
from tests.seams.plain import predict_plain

HERE = "tests.seams.small_parts"

# --- A format: what builds that of tests/seams/plain.py -------------------------------------------------------------


class PlainSide(WithoutSteps):
    def __init__(self, weights: LocalWeights | None) -> None:
        self.weights = weights

    def check_forward(self) -> None:
        from refit.errors import UnavailableError

        raise UnavailableError("plain tensors have no forward pass")

    def forward(self, tokens: torch.Tensor, replayed: Any = None) -> ForwardPass:
        return ForwardPass()


def build_plain(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> PlainSide:
    assert scenario.model is not None
    rank = dist.get_rank()
    if rank not in side.ranks:
        return PlainSide(None)
    held = predict_plain(scenario.model, side).of_rank(rank)
    shards = []
    for shard in held.shards.values():
        data = torch.empty(shard.tensor.shape, dtype=getattr(torch, shard.tensor.dtype), device=device)
        shards.append(LocalShard(shard.tensor, Box.whole(shard.tensor.shape), data, data))
    return PlainSide(LocalWeights(shards))


# --- An engine: gathers the whole model on every rank, as naive refits do -------------------------------------------


class GatheringEngine:
    uses_plan = False
    transport = "gathers"

    def __init__(self, scenario: Scenario, device: torch.device) -> None: ...

    def check_available(self) -> None:
        """Gathering needs a process group only."""

    def connect(self, planned: PlannedSides, ranks: Ranks) -> None: ...

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        return GatheringProgram(source, destination)

    def not_moved(self) -> Mapping[str, str]:
        return {}

    def note(self) -> str | None:
        return "the gathering engine is slow"


class GatheringProgram:
    staging_bytes = 0

    def __init__(self, source: Side, destination: Side) -> None:
        self._sides = source, destination

    def run(self) -> RunReport:
        source, destination = (side.weights for side in self._sides)
        assert dist.group.WORLD is not None
        mine = [(shard.tensor.key, shard.box, shard.view.clone()) for shard in source] if source is not None else []
        heard = [shard for rank in gather(dist.group.WORLD, mine) for shard in rank]
        for shard in destination or ():
            for key, box, data in heard:
                common = box.intersect(shard.box) if key == shard.tensor.key else None
                if common is not None:
                    shard.view[common.slices_within(shard.box)] = data[common.slices_within(box)]
        return RunReport()

    def close(self) -> None: ...


LEFT_OUT = "word_embeddings"
"""What the keys contain that the partial engine does not move."""


class PartialEngine(GatheringEngine):
    """Moves all but the embeddings."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._left_out: dict[str, str] = {}

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        self._left_out = {key: "embeddings stay" for key in destination.sharding.tensors if LEFT_OUT in key}
        return PartialProgram(source, destination)

    def not_moved(self) -> Mapping[str, str]:
        return self._left_out


class PartialProgram(GatheringProgram):
    def run(self) -> RunReport:
        weights = self._sides[1].weights
        left = [shard.view for shard in weights if LEFT_OUT in shard.tensor.key] if weights is not None else []
        before = [view.clone() for view in left]
        report = super().run()
        for view, old in zip(left, before, strict=True):
            view.copy_(old)
        return report


class FailingEngine(GatheringEngine):
    """Fails in its second refit, on one rank."""

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        return FailingProgram(source, destination)


class FailingProgram(GatheringProgram):
    def __init__(self, source: Side, destination: Side) -> None:
        super().__init__(source, destination)
        self._num_runs = 0

    def run(self) -> RunReport:
        report = super().run()
        self._num_runs += 1
        if self._num_runs == 2 and dist.get_rank() == 1:
            raise RefitError("the engine broke")
        return report


PARTIAL = Engine(engine=f"{HERE}:PartialEngine", title="partial engine", is_baseline=True)
FAILING = Engine(engine=f"{HERE}:FailingEngine", title="failing engine", is_baseline=True)
GATHERING = Engine(engine=f"{HERE}:GatheringEngine", title="gathering", is_baseline=True)

# --- A measurement: counts parameters on every rank -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CountResult:
    """Number of weight elements of both sides that each rank holds."""

    status: Status
    elements_per_rank: tuple[int, ...]


class CountMeasurement:
    def run(self, session: Session, source: Side, destination: Side) -> CountResult:
        session.enter("count")
        held = [side.weights for side in (source, destination) if side.weights is not None]
        mine = sum(shard.view.numel() for weights in held for shard in weights)
        session.publish(CountResult(Status.RUNNING, ()))
        return CountResult(Status.OK, tuple(gather(session.control, mine)))


def count_lines(result: CountResult, run: Result) -> Sequence[str]:
    return [f"COUNTED {sum(result.elements_per_rank):,} elements on {run.world_size} ranks"]


COUNT = MeasurementKind(
    measurement=f"{HERE}:CountMeasurement", result=f"{HERE}:CountResult", closing_lines=f"{HERE}:count_lines"
)
ENGINE_PARTS = {"gathering": GATHERING, "partial": PARTIAL, "failing": FAILING}
