"""The refit measurement: plan once, then measure each engine of the scenario. Every refit is checked."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import torch

from refit.bench.clock import Stopwatch
from refit.bench.exchange import gather
from refit.bench.file_values import reload_source
from refit.bench.measurements.engine_run import EngineRun, PlannedRefit
from refit.bench.reference import Reference
from refit.bench.session import Session
from refit.bench.sides import Side, rearranged, refitted_to
from refit.bench.training import Training
from refit.config.clusters import Cluster, choose_cluster
from refit.config.registry import ENGINES, IDENTITY, load
from refit.config.relay import Relay
from refit.config.scenario import Scenario
from refit.encodings.fp8.wire import QuantisedWire
from refit.errors import PlanError
from refit.plan import cost
from refit.plan.estimate import estimate_s, filling_s
from refit.plan.floor import floor_of, least_bytes
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import Sharding
from refit.predict.relays import Relaying, message_size
from refit.predict.sides import PlannedSides, plan_sides
from refit.report.plans.bound_text import bound_text
from refit.report.refits import refit_lines
from refit.results.refit import (
    EngineResult,
    HostTraffic,
    ModelFacts,
    QuantisedRefit,
    RefitResult,
    tested_engine,
)
from refit.results.result import MeasurementResult
from refit.results.status import Status, worst
from refit.results.step import StepResult


class RefitMeasurement:
    """The `Measurement` named `refit`."""

    def run(self, session: Session, source: Side, destination: Side) -> RefitResult:
        with torch.no_grad():
            training = Training(session, source) if session.scenario.trains("source") else None
            if training is not None:
                reload_source(session, source)
            result = _measure(session, source, destination, training)
            moved = rearranged(session, "destination", destination)
            return result if moved is None else _after_rearranging(session, source, moved, result, training)


def _after_rearranging(
    session: Session, source: Side, moved: Side, before: RefitResult, training: Training | None
) -> RefitResult:
    """`before`, with the refits of the destination whose experts are placed anew."""

    def publish(found: MeasurementResult) -> None:
        assert isinstance(found, RefitResult)
        session.publish(replace(before, rearranged=found))

    scenario = replace(session.scenario, destination=moved.spec)
    session.say(f"# experts placed anew: {moved.spec.title}")
    after = _measure(replace(session, scenario=scenario, publish=publish), source, moved, training)
    after = replace(after, start_s={})  # what came before the first refit is in `before`
    return replace(before, rearranged=after, status=worst([before.status, after.status]))


def _measure(session: Session, source: Side, destination: Side, training: Training | None) -> RefitResult:
    session.enter("plan")
    session.start.enter("plan")
    source = refitted_to(destination.spec, session.scenario.model, source)
    stopwatch = Stopwatch()
    with stopwatch.step("plan"):
        relaying = Relaying(session.scenario.relay, session.scenario.cluster, session.gpus)
        per_node, sending = session.ranks_per_node, session.scenario.sending
        sides = plan_sides(source.sharding, destination.sharding, destination.spec, per_node, sending, relaying)
    plan = sides.plan
    _check_agreement(session, plan)
    cluster, remedy = _choose_cluster(session)
    bound = _bound(session, sides, cluster)
    plan_s = stopwatch.seconds["plan"]
    doubt = _doubt_of_training(session)
    planned = PlannedRefit(source, destination, sides, bound, plan_s, training, doubt)
    result = RefitResult(
        model=_facts(source.sharding, destination.sharding),
        plan=sides.cost,
        bound=bound,
        estimate_s=_estimate(session, sides, bound, cluster),
        floor=_floor(session, plan, cluster) if cluster is not None and session.is_reporter else None,
        hosts=_host_traffic(session, sides) if session.is_reporter else None,
        quantised=_quantised(sides, destination),
    )
    scenarios = {name: scenario_of(name, session.scenario) for name in session.scenario.engines}
    engines = {
        name: load(ENGINES[name].engine)(replace(each, cluster=cluster), session.device)
        for name, each in scenarios.items()
    }
    notes = (*session.scenario.notes, *(note for engine in engines.values() if (note := engine.note())))
    lower_bound = bound_text(bound, cluster) if cluster else remedy
    session.say(
        refit_lines.header(session.scenario, session.environment, session.world_size, result, notes, lower_bound)
    )
    session.publish(result)
    for name, engine in engines.items():

        def keep(found: EngineResult, name: str = name) -> None:
            nonlocal result
            result = replace(result, engines={**result.engines, name: found})
            session.publish(result)

        own = replace(session, scenario=scenarios[name])
        reference = partial(_reference, own, planned, cluster, relaying) if own.scenario.sends_steps else None
        if session.scenario.delta is not None and own.scenario.delta is None:
            reload_source(session, source)  # another engine's refits have changed it
        writes = name == tested_engine(tuple(engines)) and _is_last(session.scenario)
        EngineRun(own, _sending(own, planned, cluster, relaying), name, engine, keep, reference, writes).measure()
        result = replace(result, start_s=_slowest_start(session))
    return replace(result, status=_status(result))


def scenario_of(name: str, scenario: Scenario) -> Scenario:
    """What the engine called `name` is asked to do: each share is measured as often as the scenario says, in turn.

    An engine that sends everything knows no encoding but what follows from the destination.
    """
    if ENGINES[name].sends_everything:
        return replace(scenario, encoding=IDENTITY, delta=None)
    if scenario.delta is None:
        return scenario
    shares, most = scenario.delta.shares, scenario.max_iterations
    turns = len(shares)
    # Turned so that the first measured refit has the first share: refit n has number n of them, warm-up included.
    turned = tuple(shares[(place - scenario.num_warmup) % turns] for place in range(turns))
    return replace(
        scenario,
        delta=replace(scenario.delta, shares=turned),
        num_iterations=turns * scenario.num_iterations,
        max_iterations=turns * most if most else None,
    )


def _is_last(scenario: Scenario) -> bool:
    """Whether these refits leave what is to be written: the destination does not place its experts anew behind them."""
    return scenario.write_weights is not None and scenario.destination.rearranged is None


def _reference(session: Session, planned: PlannedRefit, cluster: Cluster | None, relaying: Relaying) -> Reference:
    """Refits that send everything, with the scenario's own method. Collective: every rank of the job."""
    name = next(name for name, row in ENGINES.items() if row.sends_everything)
    scenario = replace(scenario_of(name, session.scenario), cluster=cluster)
    full = _sending(replace(session, scenario=scenario), planned, cluster, relaying)
    engine = load(ENGINES[name].engine)(scenario, session.device)
    return Reference(engine, full.sides, session.ranks, planned.source, planned.destination)


def _sending(session: Session, planned: PlannedRefit, cluster: Cluster | None, relaying: Relaying) -> PlannedRefit:
    """`planned` for an engine's own scenario: planned again where that sends other than the run's."""
    source, destination, sides = planned.source, planned.destination, planned.sides
    if list(sides.wires) == session.scenario.encodings:
        return planned
    per_node, sending = session.ranks_per_node, session.scenario.sending
    sides = plan_sides(source.sharding, destination.sharding, destination.spec, per_node, sending, relaying)
    return replace(planned, sides=sides, bound=_bound(session, sides, cluster))


def _bound(session: Session, sides: PlannedSides, cluster: Cluster | None) -> cost.Bound | None:
    if cluster is None:
        return None
    return cost.lower_bound(cost.bytes_matrix(sides.plan), cluster, session.gpus, sides.work_bytes)


def _doubt_of_training(session: Session) -> str | None:
    training = session.measured.get("train-step")
    return training.reason if isinstance(training, StepResult) and training.status is Status.WRONG_DATA else None


def _check_agreement(session: Session, plan: RefitPlan) -> None:
    """Raise PlanError unless every rank made the same plan. Collective: every rank of the job."""
    for rank, digest in enumerate(gather(session.control, plan.digest)):
        if digest != plan.digest:
            raise PlanError(
                f"ranks {session.rank} and {rank} made different plans: {plan.digest[:12]} and {digest[:12]}"
            )


def _floor(session: Session, plan: RefitPlan, cluster: Cluster) -> cost.Bound | None:
    ranks_per_node = cluster.gpus_per_node * session.gpus.most_ranks
    return floor_of(
        least_bytes(plan.source_sharding, plan.destination_sharding, ranks_per_node),
        cluster,
        ranks_per_node,
        session.gpus,
    )


def _estimate(session: Session, sides: PlannedSides, bound: cost.Bound | None, cluster: Cluster | None) -> float | None:
    """The bound with what relays take to fill and drain; None without a relay."""
    if cluster is None or sides.relay is Relay.OFF:
        return None
    size = message_size(session.scenario.method, session.scenario.staging_bytes)
    return estimate_s(bound, filling_s(sides.plan, size, cluster, session.gpus))


def _host_traffic(session: Session, sides: PlannedSides) -> HostTraffic | None:
    """What crosses between hosts; None on a single one."""
    per_host = session.ranks_per_node
    if per_host is None:
        return None
    plan = sides.plan
    sent, *_, received = plan.shardings
    traffic = cost.split_traffic(cost.bytes_matrix(plan), per_host)
    between = direct = int(traffic.sent_between.sum())
    if sides.relay is not Relay.OFF:
        without = plan_refit(sent, received, ranks_per_node=per_host)
        direct = int(cost.split_traffic(cost.bytes_matrix(without), per_host).sent_between.sum())
    return HostTraffic(
        num_ranks=dict(Counter(session.ranks.host_of)),
        relay=sides.relay.value,
        between_bytes=between,
        within_bytes=int(traffic.sent_within.sum()),
        least_bytes=least_bytes(sent, received, per_host).between,
        direct_bytes=direct,
    )


def _slowest_start(session: Session) -> dict[str, float]:
    """The longest time that any rank spent in each phase up to its first refit. Collective: every rank of the job.

    Empty where no engine has refitted yet.
    """
    ranks = gather(session.control, session.start.seconds)
    if "first refit" not in session.start.seconds:
        return {}
    return {phase: max(seconds.get(phase, 0.0) for seconds in ranks) for phase in session.start.seconds}


def _choose_cluster(session: Session) -> tuple[Cluster | None, str]:
    """The cluster that gives the lower bound, or None and the remedy. On CPUs only a cluster that was named."""
    named = session.scenario.cluster
    if named is not None or session.device.type == "cpu":
        return named, ""
    num_hosts = math.ceil(session.world_size / (session.ranks_per_node or session.world_size))
    num_gpus = num_hosts * session.gpus.gpus_per_host
    choice = choose_cluster(torch.cuda.get_device_name(session.device), num_gpus, num_hosts)
    return choice.cluster, choice.remedy


def _facts(source: Sharding, destination: Sharding) -> ModelFacts:
    """The parameters are counted without the scales of FP8 codes, which only the destination has."""
    held = [tensor for key, tensor in destination.tensors.items() if key in source.tensors]
    dtypes = sorted({tensor.dtype for tensor in destination.tensors.values()})
    return ModelFacts(sum(math.prod(tensor.shape) for tensor in held), len(held), tuple(dtypes))


def _quantised(sides: PlannedSides, destination: Side) -> QuantisedRefit | None:
    wire = next((wire for wire in sides.wires.values() if isinstance(wire, QuantisedWire)), None)
    if wire is None:
        return None
    quantisation = wire.quantisation
    reasons: dict[str, int] = {}
    for reason in wire.reasons.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return QuantisedRefit(
        dtype=quantisation.dtype,
        block=quantisation.format.text,
        rule=quantisation.rule,
        rule_source=quantisation.source,
        kept=quantisation.kept,
        num_tensors=len(wire.tensors),
        num_kept=len(destination.sharding.tensors) - 2 * len(wire.tensors),
        blocks_at_source=wire.num_at_source,
        blocks_at_destination=wire.num_at_destination,
        reasons=reasons,
    )


def _status(result: RefitResult) -> Status:
    """The status of the engine under test. Errors of a baseline beside it do not change it."""
    tested = result.tested
    assert tested is not None
    return tested.verdict
