"""One run: build both sides, take each measurement, update the result file, return the exit code."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

from refit.bench.measurements.base import Measurement
from refit.bench.method_choice import check_hosts, check_same_method, with_method
from refit.bench.served import served
from refit.bench.session import Session, device_for, launched, meet
from refit.bench.sides import build_side
from refit.config.clusters import check_hosts_of
from refit.config.registry import ENGINES, FORMATS, MEASUREMENTS, load
from refit.config.scenario import Scenario
from refit.copies.batch import start_loading_kernels
from refit.errors import UnavailableError
from refit.predict.cpus import check_running, this_machine
from refit.report.plans.rank_map import rank_map
from refit.report.refits.warnings import idle_ranks
from refit.report.steps.cycle import cycle_lines
from refit.results.result import MeasurementResult, Result, ResultFile, now
from refit.results.status import worst


def run(scenario: Scenario) -> int:
    """Run a scenario in a process that torchrun started and return its exit code. Collective: every rank of the job.

    Raises UnavailableError, before any process group exists, where something it needs is missing on this machine, and
    UsageError where the weights are more than the memory of its CPUs.
    """
    _check_libraries(scenario)
    ranks = meet(scenario.timeout_s)
    check_hosts(scenario.method, ranks.host_of)
    scenario = with_method(scenario, ranks.host_of)
    _check_available(scenario)
    if device_for(scenario).type == "cuda":
        start_loading_kernels()
    elif ranks.rank == 0 and len(set(ranks.host_of)) == 1:
        # All ranks share the memory. No other gets past the process group without rank 0.
        check_running(scenario, this_machine())
    with launched(scenario, ranks) as launch:
        try:
            check_same_method(launch.session)
            _check_cluster(launch.session)
            return benchmark(launch.session, launch.file).exit_code or 0
        except BaseException as error:
            return launch.watchdog.fail(error)


def benchmark(session: Session, file: ResultFile | None = None) -> Result:
    """Take the measurements of the session's scenario. The result is the same on every rank.

    Collective: every rank of the job, idle ones too.
    """
    scenario = session.scenario
    record = _Record(session, file)
    session.say(rank_map(scenario, session.world_size))
    source, destination = (build_side(session, name) for name in ("source", "destination"))
    with served(session, destination):
        for name in scenario.measurements:
            measurement: Measurement = load(MEASUREMENTS[name].measurement)()
            recording = replace(session, publish=partial(record.keep, name), measured=record.measured)
            record.keep(name, measurement.run(recording, source, destination))
    if source.model.trainer is not None:
        source.model.trainer.close()
    result = record.conclude()
    for line in _closing_lines(session, result):
        session.say(line)
    if file is not None:
        session.say(f"Result: {file.path}")
    return result


class _Record:
    """The result of a run so far, and its file on rank 0."""

    def __init__(self, session: Session, file: ResultFile | None) -> None:
        self._file = file
        self._result = Result(
            run_id=file.run_id if file else "",
            started=now(),
            world_size=session.world_size,
            device=session.device.type,
            scenario=session.scenario,
            environment=session.environment,
        )
        self._update(self._result)

    @property
    def measured(self) -> dict[str, MeasurementResult]:
        return self._result.measurements

    def keep(self, name: str, found: MeasurementResult) -> None:
        """Store a measurement's result so far, in place of its earlier one."""
        self._update(replace(self._result, measurements={**self._result.measurements, name: found}))

    def conclude(self) -> Result:
        status = worst([found.status for found in self._result.measurements.values()])
        self._update(replace(self._result, status=status, exit_code=int(status.exit_code), finished=now()))
        return self._result

    def _update(self, result: Result) -> None:
        self._result = result
        if self._file is not None:
            self._file.write(result)


def _check_libraries(scenario: Scenario) -> None:
    has_files = scenario.source_weights is not None or scenario.write_weights is not None
    if has_files and importlib.util.find_spec("safetensors") is None:
        raise UnavailableError(
            "--source-weights and --write-weights are verified with safetensors, which is not installed: pip install "
            "'refit-benchmark[hf]'"
        )
    for side in scenario.sides.values():
        for library, command in FORMATS[side.format].libraries:
            if importlib.util.find_spec(library) is None:
                raise UnavailableError(f"{side.format} sides need {library}, which is not installed: {command}")


def _check_available(scenario: Scenario) -> None:
    device = device_for(scenario)
    for side in scenario.sides.values():
        available = FORMATS[side.format].available
        if available is not None:
            load(available)(scenario, device)
    for name in scenario.engines:
        if not ENGINES[name].is_baseline:
            load(ENGINES[name].engine)(scenario, device).check_available()


def _check_cluster(session: Session) -> None:
    """Raise UsageError where ranks do not fill hosts in order, or have other hosts than the cluster that was measured.

    Before the sides are built.
    """
    per_host, cluster = session.ranks_per_node or session.world_size, session.scenario.cluster
    if cluster is not None:
        check_hosts_of(cluster, session.gpus.gpus_per_host, -(-session.world_size // per_host))


def _closing_lines(session: Session, result: Result) -> list[str]:
    # An idle rank takes a GPU from others, but nothing from the CPUs.
    lines = [idle_ranks(session.scenario, session.world_size)] if session.device.type == "cuda" else []
    for name, found in result.measurements.items():
        lines += load(MEASUREMENTS[name].closing_lines)(found, result)
    return [*lines, *cycle_lines(result)]
