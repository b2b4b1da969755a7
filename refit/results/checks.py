"""What must hold between the fields of a decoded result, beyond their types. Reports rely on it."""

from __future__ import annotations

from refit.config.limits import MAX_RANKS
from refit.plan.cost import Bound, Cost
from refit.results.refit import EngineResult, RefitResult, Sample
from refit.results.stats import Summary


def check_refit(result: RefitResult) -> None:
    """Raise ValueError, naming the field, for times, ranks and bytes that no refit can have."""
    if result.plan is not None:
        check_cost(result.plan, "plan")
    if result.bound is not None:
        check_bound(result.bound, "bound")
    for phase, seconds in result.start_s.items():
        _not_negative(seconds, f"start_s.{phase}")
    for name, engine in result.engines.items():
        _check_engine(engine, f"engines.{name}")
    if result.rearranged is not None:
        check_refit(result.rearranged)


def check_cost(cost: Cost, place: str) -> None:
    """Raise ValueError for negative bytes, ranks out of range, and for a side without ranks."""
    for name in ("payload_bytes", "wire_bytes", "local_bytes", "num_transfers"):
        _not_negative(getattr(cost, name), f"{place}.{name}")
    sides = (
        ("sent_by_rank", cost.sent_by_rank),
        ("received_by_rank", cost.received_by_rank),
        ("local_by_rank", cost.local_by_rank),
        ("source_weights_by_rank", cost.source_weights_by_rank),
        ("destination_weights_by_rank", cost.destination_weights_by_rank),
    )
    for name, by_rank in sides:
        if not by_rank and name in ("sent_by_rank", "received_by_rank"):
            raise ValueError(f"{place}.{name} has no ranks")
        for rank, nbytes in by_rank.items():
            check_rank(rank, f"{place}.{name}")
            _not_negative(nbytes, f"{place}.{name}")


def check_bound(bound: Bound, place: str) -> None:
    """Raise ValueError for a negative time."""
    _not_negative(bound.seconds, f"{place}.seconds")


def check_rank(rank: int, place: str) -> None:
    """Raise ValueError unless there can be such a rank."""
    if not 0 <= rank < MAX_RANKS:
        raise ValueError(f"{place}: {rank} is not a rank from 0 to {MAX_RANKS - 1}")


def _check_engine(engine: EngineResult, place: str) -> None:
    for number, sample in enumerate(engine.samples):
        _check_sample(sample, f"{place}.samples[{number}]")
    for each in engine.not_moved:
        _not_negative(min(each.num_tensors, each.num_elements, each.nbytes), f"{place}.not_moved")
    for name, seconds in engine.cold_s.items():
        _not_negative(seconds, f"{place}.cold_s.{name}")
    for optional in ("connect_s", "bottleneck_gb_per_s", "share_of_lower_bound"):
        _not_negative(getattr(engine, optional) or 0.0, f"{place}.{optional}")
    if engine.summary is not None:
        _check_summary(engine.summary, f"{place}.summary")
        if not engine.measured_s:
            raise ValueError(f"{place} has a summary without measured refits")


def _check_sample(sample: Sample, place: str) -> None:
    if not sample.seconds_per_rank:
        raise ValueError(f"{place}.seconds_per_rank is empty")
    if not 0 <= sample.slowest_rank < len(sample.seconds_per_rank):
        raise ValueError(f"{place}.slowest_rank {sample.slowest_rank} is not one of its ranks")
    _not_negative(min(sample.seconds_per_rank), f"{place}.seconds_per_rank")
    if not 0 <= (sample.sent_bytes or 0) <= (sample.most_sent_bytes or 0):
        raise ValueError(f"{place}: sent_bytes {sample.sent_bytes} are not up to {sample.most_sent_bytes}")
    _not_negative(min(sample.num_compared, sample.num_wrong), f"{place}: number of elements")


def _check_summary(summary: Summary, place: str) -> None:
    if not 0 < summary.min_s <= summary.median_s <= summary.max_s:
        raise ValueError(f"{place}: min_s, median_s and max_s must be above 0 and in this order")


def _not_negative(value: float, place: str) -> None:
    if value < 0:
        raise ValueError(f"{place} is negative")
