"""The measured scenarios of a run, as the analysis compares them."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from refit.config.quantisation import Quantisation
from refit.config.scenario import Mode
from refit.config.side import SideSpec
from refit.report.refits.run_spread import Repeated, Samples, by_scenario
from refit.results.outcomes import Outcome
from refit.results.result import Environment
from refit.results.stats import summarise
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Point:
    """A measured scenario. `model` is equal for scenarios that move the same model.

    `samples_s` are the measured refits of each of its runs; `conditions` the versions and the GPU, by name.
    """

    name: str
    source: SideSpec
    destination: SideSpec
    mode: str
    method: str
    model: Hashable
    median_s: float
    samples_s: Samples
    conditions: dict[str, str]
    payload: int
    wire: int
    busiest: int
    num_transfers: int | None
    gb_per_s: float | None
    share: float | None
    place: str

    @property
    def layouts(self) -> Hashable:
        """Both layouts without their rank numbers."""
        return tuple((side.title, side.world_size) for side in (self.source, self.destination))

    @property
    def quantisation(self) -> Quantisation | None:
        """Of the destination."""
        return self.destination.quantisation

    @property
    def unquantised_layouts(self) -> Hashable:
        """As `layouts`, those of a destination in the source's dtype."""
        return replace(self, destination=replace(self.destination, quantisation=None)).layouts

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
        """Standard deviation of the refits of all its runs over their mean."""
        refits_s = [seconds for run in self.samples_s for seconds in run]
        return summarise(refits_s).cv if refits_s else 0.0


def points_of(outcomes: Iterable[Outcome]) -> list[Point]:
    """The scenarios that may be compared: without wrong data (verified or unchecked), with times and layouts.

    All runs of one scenario are one point, named with their number and spread.
    """
    found = ((scenario, list(filter(None, map(_point, scenario.outcomes)))) for scenario in by_scenario(outcomes))
    return [_joined(scenario, points) if scenario.has_runs else points[0] for scenario, points in found if points]


def _joined(scenario: Repeated, runs: Sequence[Point]) -> Point:
    """The runs of a scenario as one point: the median of their medians, and the refits of each."""
    spread = f", spread {100 * scenario.spread:.1f} %" if len(runs) > 1 else ""
    names = dict.fromkeys(name for run in runs for name in run.conditions)
    return replace(
        runs[0],
        name=f"{scenario.name} ({scenario.count}{spread})",
        median_s=statistics.median(run.median_s for run in runs),
        samples_s=[samples for run in runs for samples in run.samples_s],
        conditions={
            name: " / ".join(dict.fromkeys(run.conditions.get(name, "none") for run in runs)) for name in names
        },
        gb_per_s=median(run.gb_per_s for run in runs),
        share=median(run.share for run in runs),
    )


def median(values: Iterable[float | None]) -> float | None:
    """The median; None where a value is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.median(known) if known and len(known) == len(found) else None


def _point(outcome: Outcome) -> Point | None:
    planned, cost, median_s = outcome.planned, outcome.cost, outcome.median_s
    source, destination = planned.source, planned.destination
    if outcome.status is not Status.OK or not median_s or source is None or destination is None:
        return None
    if cost is None or not cost.payload_bytes:
        return None
    return Point(
        name=planned.name,
        source=source,
        destination=destination,
        mode=planned.mode,
        method=outcome.method,
        model=_model(outcome),
        median_s=median_s,
        samples_s=[outcome.tested.measured_s] if outcome.tested else [],
        conditions=_conditions(outcome),
        payload=cost.payload_bytes,
        wire=cost.wire_bytes,
        busiest=cost.busiest.nbytes,
        num_transfers=outcome.refit.plan.num_transfers if outcome.refit.plan else None,
        gb_per_s=outcome.tested.bottleneck_gb_per_s if outcome.tested else None,
        share=outcome.share_of_bound,
        place=outcome.place,
    )


def _model(outcome: Outcome) -> Hashable:
    scenario = outcome.result.scenario if outcome.result else None
    return (scenario.model, scenario.model_provider, scenario.source.transformer_impl) if scenario else None


def _conditions(outcome: Outcome) -> dict[str, str]:
    environment = (outcome.result.environment if outcome.result else None) or Environment()
    gpu = {"GPU": environment.gpus[0].name} if environment.gpus else {}
    return {**environment.versions, **gpu}
