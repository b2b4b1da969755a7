"""The measured scenarios of a run, as the analysis compares them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from refit.config.scenario import Mode
from refit.config.side import SideSpec
from refit.results.outcomes import Outcome
from refit.results.result import Environment
from refit.results.stats import summarise
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Point:
    """A measured scenario. `model` is equal for scenarios that move the same model.

    `samples_s` are its measured refits; `conditions` the versions and the GPU, by name.
    """

    name: str
    source: SideSpec
    destination: SideSpec
    mode: str
    method: str
    model: Hashable
    median_s: float
    samples_s: tuple[float, ...]
    conditions: dict[str, str]
    payload: int
    wire: int
    busiest: int
    num_transfers: int | None
    gb_per_s: float | None
    share: float | None

    @property
    def layouts(self) -> Hashable:
        """Both layouts without their rank numbers."""
        return tuple((side.title, side.world_size) for side in (self.source, self.destination))

    @property
    def title(self) -> str:
        return f"{self.source.title} -> {self.destination.title}"

    @property
    def num_gpus(self) -> int:
        sizes = (self.source.world_size, self.destination.world_size)
        return max(sizes) if self.mode == Mode.COLLOCATED.value else sum(sizes)

    @property
    def s_per_gb(self) -> float:
        """Seconds per GB of payload into one destination GPU, on average."""
        return self.median_s * self.destination.world_size * 1e9 / self.payload

    @property
    def cv(self) -> float:
        """Standard deviation of its refits over their mean."""
        return summarise(self.samples_s).cv if self.samples_s else 0.0


def points_of(outcomes: Iterable[Outcome]) -> list[Point]:
    """The scenarios that may be compared: without wrong data (verified or unchecked), with times and layouts."""
    points = []
    for outcome in outcomes:
        planned, cost, median_s = outcome.planned, outcome.cost, outcome.median_s
        source, destination = planned.source, planned.destination
        comparable = outcome.status is Status.OK and median_s and source and destination
        if not comparable or cost is None or not cost.payload_bytes:
            continue
        assert source
        assert destination
        assert median_s
        points.append(
            Point(
                name=planned.name,
                source=source,
                destination=destination,
                mode=planned.mode,
                method=planned.method,
                model=_model(outcome),
                median_s=median_s,
                samples_s=tuple(outcome.tested.measured_s) if outcome.tested else (),
                conditions=_conditions(outcome),
                payload=cost.payload_bytes,
                wire=cost.wire_bytes,
                busiest=cost.busiest.nbytes,
                num_transfers=outcome.refit.plan.num_transfers if outcome.refit.plan else None,
                gb_per_s=outcome.tested.bottleneck_gb_per_s if outcome.tested else None,
                share=outcome.share_of_bound,
            )
        )
    return points


def _model(outcome: Outcome) -> Hashable:
    scenario = outcome.result.scenario if outcome.result else None
    return (scenario.model, scenario.model_provider, scenario.source.transformer_impl) if scenario else None


def _conditions(outcome: Outcome) -> dict[str, str]:
    environment = (outcome.result.environment if outcome.result else None) or Environment()
    gpu = {"GPU": environment.gpus[0].name} if environment.gpus else {}
    return {**environment.versions, **gpu}
