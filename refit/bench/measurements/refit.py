"""One engine's refits: prepare once, then fill, poison, refit under the clock and check, as often as asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from refit.bench import oracle
from refit.bench.clock import Stopwatch, Timing, time_run
from refit.bench.exchange import gather
from refit.bench.forward_check import compare_forward
from refit.bench.memory import PeakMemory, past_torch
from refit.bench.profile import profiled
from refit.bench.session import Session
from refit.bench.sides import Sides
from refit.config.scenario import Engine, Scenario, Verify
from refit.errors import RefitError, UnavailableError
from refit.plan.plan import RefitPlan
from refit.report import text
from refit.report.progress import Progress
from refit.results.result import EngineResult, Sample, WrongWeights
from refit.results.stats import summarise
from refit.transport.base import Program, Transport, TransportOptions, get_transport
from refit.transport.two_sided.backends import connect_nccl_pairs

MAX_WRONG_PER_RANK = 100
"""Wrong tensors a rank reports per iteration; the counts of elements are complete."""


@dataclass(frozen=True, slots=True)
class _RankSample:
    """One rank's part of one refit, as gathered."""

    rank: int
    timing: Timing
    verdict: oracle.Verdict


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why an engine was not measured, by the names EngineResult uses."""

    status: str
    reason: str


def measure_engine(session: Session, sides: Sides, plan: RefitPlan, engine: Engine, plan_s: float) -> None:
    """Measure `engine` and leave its EngineResult in the session's result.

    Collective: every rank of the job. An engine that cannot run here is waived with the reason, not raised.
    """
    name, outcome, stopwatch = engine.value, EngineResult(), Stopwatch()
    session.result.engines[name] = outcome
    session.enter(f"connect {name}")
    transport = get_transport(session.scenario.method.value)
    before = past_torch(session.device)
    with stopwatch.step("connect"):
        refusal = _attempt(engine, lambda: _connect(session, transport, plan, engine))
    if _is_refused(session, outcome, refusal):
        return
    outcome.connect_memory_bytes_per_rank = gather(session.control, past_torch(session.device) - before)
    session.enter(f"prepare {name}")
    memory = PeakMemory(session.device)
    made: list[Program] = []
    with stopwatch.step("prepare"), memory.watch():
        refusal = _attempt(engine, lambda: made.append(_prepare(session, sides, plan, engine, transport)))
    if _is_refused(session, outcome, refusal):
        return
    program = made[0]
    _iterate(session, sides, program, name, memory)
    outcome.extra_memory_bytes_per_rank = gather(session.control, memory.extra_bytes)
    outcome.staging_bytes_per_rank = gather(session.control, program.staging_bytes)
    _summarise(session, outcome, {"plan": plan_s} if engine is Engine.REFIT else {}, stopwatch, plan)
    if session.scenario.check_forward:
        session.enter(f"forward after {name}")
        forward = compare_forward(session, sides)
        outcome.forward = {**asdict(forward), "passed": forward.passed}
        session.say(text.forward_line(name, outcome.forward))
    if session.scenario.profile:
        session.enter(f"profile {name}")
        outcome.profile = [[asdict(each) for each in mine] for mine in gather(session.control, profiled(program.run))]
        if session.is_reporter:
            session.say(text.profile_table(name, outcome))
    session.enter(f"close {name}")
    program.close()
    session.save()


def _connect(session: Session, transport: Transport, plan: RefitPlan, engine: Engine) -> None:
    """What a process does once, and no refit should be charged for: the peer's share of it too."""
    if engine is Engine.REFIT:
        transport.connect(plan, _options(session.scenario))
    elif session.device.type == "cuda":
        assert dist.group.WORLD is not None
        connect_nccl_pairs(plan, dist.group.WORLD, session.device)


def _prepare(session: Session, sides: Sides, plan: RefitPlan, engine: Engine, transport: Transport) -> Program:
    scenario, source, destination = session.scenario, sides.source, sides.destination
    if engine is Engine.REFIT:
        return transport.prepare(plan, source.memory, destination.memory, _options(scenario))
    # Imported here: a Megatron without its resharding package can still be refitted by ours.
    from refit.bench.engines.megatron import prepare_megatron_refit

    return prepare_megatron_refit(source.model, destination.model, scenario.method.value, device=session.device)


def _options(scenario: Scenario) -> TransportOptions:
    return TransportOptions(
        scenario.staging_bytes, scenario.timeout_s, scenario.nvshmem_buffers, scenario.nvshmem_force_put
    )


def _attempt(engine: Engine, action: Callable[[], None]) -> _Refusal | None:
    """Why `action` cannot be done here: something is not there, or the peer itself refuses."""
    try:
        action()
    except UnavailableError as error:
        return _Refusal("waived", str(error))
    except RefitError as error:
        if engine is Engine.REFIT:
            raise
        return _Refusal("failed", str(error))
    return None


def _is_refused(session: Session, outcome: EngineResult, refusal: _Refusal | None) -> bool:
    """Collective: what stops one rank stops all."""
    refused = next((each for each in gather(session.control, refusal) if each is not None), None)
    if refused is not None:
        outcome.status, outcome.reason = refused.status, refused.reason
    return refused is not None


def _iterate(session: Session, sides: Sides, program: Program, name: str, memory: PeakMemory) -> None:
    scenario = session.scenario
    warmup, total = scenario.num_warmup, scenario.num_warmup + scenario.num_iterations
    progress = Progress(name)
    for iteration in range(total):
        session.enter(f"{name} iteration {iteration + 1}: fill")
        if sides.source.memory is not None:
            oracle.fill(sides.source.memory, iteration)
        if sides.destination.memory is not None:
            oracle.poison(sides.destination.memory)
        session.enter(f"{name} iteration {iteration + 1}: move")
        with memory.watch():
            timing = time_run(program, session.control, session.device)
        session.enter(f"{name} iteration {iteration + 1}: verify")
        mine = _RankSample(session.rank, timing, _check(sides, iteration, scenario.verify))
        gathered = gather(session.control, mine)
        if session.is_reporter:
            sample = _record(session.result.engines[name], gathered, iteration, iteration < warmup)
            number = iteration + 1 if sample.warmup else iteration + 1 - warmup
            count = warmup if sample.warmup else scenario.num_iterations
            session.say(progress.line(sample, number, count))
            session.save()


def _check(sides: Sides, iteration: int, verify: Verify) -> oracle.Verdict:
    memory = sides.destination.memory
    if memory is None or verify is Verify.OFF:
        return oracle.Verdict(0, ())
    return oracle.check(memory, sides.source.sharding.tensors, iteration, sample=verify is Verify.SAMPLE)


def _record(outcome: EngineResult, ranks: list[_RankSample], iteration: int, warmup: bool) -> Sample:
    slowest = max(ranks, key=lambda each: each.timing.seconds)
    phases = slowest.timing.report.phases_s
    sample = Sample(
        iteration=iteration,
        warmup=warmup,
        seconds_per_rank=[each.timing.seconds for each in ranks],
        slowest_rank=slowest.rank,
        phases_s=phases,
        unattributed_s=slowest.timing.seconds - sum(phases.values()),
        num_compared=sum(each.verdict.num_compared for each in ranks),
        num_wrong=sum(each.verdict.num_wrong for each in ranks),
    )
    outcome.samples.append(sample)
    for each in ranks:
        for wrong in each.verdict.wrong[:MAX_WRONG_PER_RANK]:
            first = wrong.first
            outcome.wrong.append(
                WrongWeights(
                    iteration, each.rank, wrong.key, wrong.num_wrong, list(first.index), first.expected, first.found
                )
            )
    return sample


def _summarise(
    session: Session, outcome: EngineResult, cold_s: dict[str, float], stopwatch: Stopwatch, plan: RefitPlan
) -> None:
    slowest = {name: max(gather(session.control, seconds)) for name, seconds in {**cold_s, **stopwatch.seconds}.items()}
    if not session.is_reporter:
        return
    outcome.connect_s = slowest.pop("connect")
    outcome.cold_s = {**slowest, "first": outcome.samples[0].seconds}
    outcome.summary = asdict(summarise(outcome.measured_s))
    busiest = session.result.bytes["busiest"]
    outcome.bottleneck_gb_per_s = busiest / outcome.summary["median_s"] / 1e9 if busiest else None
    outcome.status = "wrong_data" if outcome.num_wrong else "ok"
