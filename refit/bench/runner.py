"""The sequence of one scenario: build, plan, prepare, then refit and verify until the numbers stand."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from refit.bench.clock import Stopwatch
from refit.bench.exchange import gather
from refit.bench.measurements.refit import measure_engine
from refit.bench.session import Session, launched
from refit.bench.sides import Sides, build_sides
from refit.config.clusters import choose_cluster
from refit.config.scenario import Engine, Method, Scenario
from refit.errors import ExitCode, PlanError
from refit.plan import cost
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.report import text, warnings
from refit.report.bound import bound_text
from refit.report.rank_map import rank_map
from refit.results.result import Result, now
from refit.transport.base import get_transport


def run(scenario: Scenario) -> int:
    """Run a scenario in a process that torchrun started and return its exit code.

    Raises UnavailableError before any process group exists where the transport is not to be had on this machine.
    """
    if scenario.engine is not Engine.MEGATRON:
        get_transport(scenario.method.value).check_available()
    with launched(scenario) as (session, watchdog):
        try:
            benchmark(session)
            return session.result.exit_code or 0
        except BaseException as error:
            return watchdog.fail(error)


def benchmark(session: Session) -> None:
    """Measure the session's scenario; afterwards `session.result` has the exit code on every rank.

    Collective: every rank of the job, idle ones too.
    """
    with torch.no_grad():
        session.say(rank_map(session.scenario, dist.get_world_size()))
        sides = build_sides(session)
        session.enter("plan")
        stopwatch = Stopwatch()
        with stopwatch.step("plan"):
            plan = plan_refit(sides.source.sharding, sides.destination.sharding, ranks_per_node=_ranks_per_node())
        _check_agreement(session, plan)
        _describe(session, sides, plan)
        bound = _find_bound(session, plan)
        session.say(text.header(session.result, (*session.scenario.notes, *_peer_note(session.scenario)), bound))
        session.save()
        for engine in _engines(session.scenario.engine):
            measure_engine(session, sides, plan, engine, stopwatch.seconds["plan"])
            _compare_with_bound(session.result, engine)
        _conclude(session)


def _peer_note(scenario: Scenario) -> tuple[str, ...]:
    if scenario.engine is Engine.REFIT or scenario.method is not Method.SHM:
        return ()
    return ("Megatron-Core's own refit runs over Gloo here: on CPUs it has no other way",)


def _engines(choice: Engine) -> list[Engine]:
    return [Engine.REFIT, Engine.MEGATRON] if choice is Engine.BOTH else [choice]


def _ranks_per_node() -> int | None:
    """Ranks on each node, as torchrun says; None on a single node, where all replicas are equally near."""
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "0")), dist.get_world_size()
    return local if 0 < local < world else None


def _check_agreement(session: Session, plan: RefitPlan) -> None:
    """Ranks plan on their own; make sure once that they came to the same plan."""
    for rank, digest in enumerate(gather(session.control, plan.digest)):
        if digest != plan.digest:
            raise PlanError(
                f"ranks {session.rank} and {rank} made different plans: {plan.digest[:12]} and {digest[:12]}"
            )


def _describe(session: Session, sides: Sides, plan: RefitPlan) -> None:
    """Fill in everything a result says before the first refit."""
    scenario, result = session.scenario, session.result
    sharding = sides.destination.sharding
    result.scenario = {
        **{
            name: _plain(getattr(scenario, name))
            for name in ("mode", "method", "engine", "num_warmup", "num_iterations")
        },
        **{name: _plain(getattr(scenario, name)) for name in ("verify", "check_forward", "staging_bytes", "timeout_s")},
        **{
            name: getattr(scenario, name)
            for name in ("transformer_impl", "model_name", "model_provider", "notes", "recorded")
        },
        **{name: getattr(scenario, name) for name in ("nvshmem_buffers", "nvshmem_force_put")},
        "device": session.device.type,
        "title": scenario.title,
        "world_size": dist.get_world_size(),
        "dtypes": sorted({tensor.dtype for tensor in sharding.tensors.values()}),
        "num_parameters": sharding.num_parameters,
        "num_tensors": len(sharding.tensors),
        "model": asdict(scenario.model) if scenario.model else None,
    }
    result.layouts = {name: asdict(getattr(sides, name).layout) for name in ("source", "destination")}
    result.bytes = cost.summary(plan)
    result.plan = {"num_transfers": len(plan), "digest": plan.digest, "casts": plan.casts}


def _find_bound(session: Session, plan: RefitPlan) -> str:
    """Fill in the result's bound; what the header says of it, or of why there is none. On CPUs none is looked for."""
    cluster = session.scenario.cluster
    if cluster is None:
        if session.device.type == "cpu":
            return ""
        num_ranks = dist.get_world_size()
        num_hosts = math.ceil(num_ranks / (_ranks_per_node() or num_ranks))
        choice = choose_cluster(torch.cuda.get_device_name(session.device), num_ranks, num_hosts)
        if choice.cluster is None:
            return choice.remedy
        cluster = choice.cluster
    bound = cost.lower_bound(cost.bytes_matrix(plan), cluster)
    if bound is not None:
        session.result.bound = {
            "cluster": cluster.name,
            "lower_bound_s": bound.seconds,
            "limited_by": bound.limited_by,
        }
    return bound_text(bound, cluster)


def _compare_with_bound(result: Result, engine: Engine) -> None:
    outcome = result.engines[engine.value]
    if result.bound is not None and outcome.summary:
        outcome.share_of_lower_bound = result.bound["lower_bound_s"] / outcome.summary["median_s"]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _conclude(session: Session) -> None:
    """Settle the exit code on every rank, write the result and print the verdict."""
    result = session.result
    codes = [int(_exit_code(result, session.scenario))] if session.is_reporter else [0]
    dist.broadcast_object_list(codes, group=session.control)
    result.exit_code = codes[0]
    result.status = {0: "ok", 1: "wrong_data", 3: "waived"}.get(codes[0], "failed")
    result.finished = now()
    session.save()
    if not session.is_reporter or session.file is None:
        return
    for line in _closing_lines(session):
        session.say(line)
    session.say(f"Result: {session.file.path}")


def _closing_lines(session: Session) -> list[str]:
    result, engines = session.result, session.result.engines
    lines = [warnings.idle_ranks(session.scenario, dist.get_world_size())]
    for name, engine in engines.items():
        if engine.summary:
            lines += [text.times(engine, result.bound)] if len(engines) == 1 else []
            lines += warnings.of_engine(name, engine, result)
        lines.append(text.wrong_weights(name, engine))
    lines += [text.table(engines), text.ratio(engines)]
    lines += [text.verdict(name, engine, session.scenario.verify.value) for name, engine in engines.items()]
    return lines


def _exit_code(result: Result, scenario: Scenario) -> ExitCode:
    """Of the engine under test: ours, or the peer where it runs alone. What the peer gets wrong beside ours is a
    finding."""
    judged = result.engines[Engine.MEGATRON.value if scenario.engine is Engine.MEGATRON else Engine.REFIT.value]
    if judged.status == "waived":
        return ExitCode.WAIVED
    if judged.status == "failed":
        return ExitCode.FAILED
    wrong_logits = judged.forward is not None and not judged.forward["passed"]
    return ExitCode.WRONG_DATA if judged.num_wrong or wrong_logits else ExitCode.OK
