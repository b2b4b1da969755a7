"""Follows a job until it has ended: prints the logs of its pods, collects its result, judges gates, and cleans up."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from refit.errors import ExitCode, RefitError
from refit.launch.host import CUT_SHORT, TIMED_OUT
from refit.launch.kubernetes.api import WATCH_S, Api, Object, Refused
from refit.launch.kubernetes.logs import Logs
from refit.launch.kubernetes.submit import Submitted
from refit.launch.kubernetes.values import Values
from refit.launch.kubernetes.verdicts import Verdict, has_ended, has_started, is_hopeless, verdict, why_pending
from refit.report.terminal.console import show
from refit.results.reading import UnreadableFile
from refit.results.result import CANCELLED, Failure, Result, ResultFile, read_result, replace_text
from refit.results.status import Status
from refit.results.sweep import Attempt


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that pods may wait for nodes, and that they may then run; 0: for ever."""

    pending_s: float
    running_s: float


def follow(api: Api, values: Values, submitted: Submitted, nodes: int, attempt: Attempt, limits: Limits) -> int:
    """Follow a job to its end. Returns the exit code of its attempt, with the result beside the attempt's log.

    Whatever ends this, a signal too, the job and what is beside it are deleted; but not where the API stays away.
    """
    logs = Logs(api, values.gates)
    try:
        ended = _Watch(api, submitted, nodes, logs, limits).ended()
    except RefitError:
        raise
    except BaseException:  # a signal
        _delete(api, submitted)
        raise
    if ended.line:
        show(ended.line)
    logs.drain(all_pods=False)
    if ended.exit_code != 0:  # others may still run, and their logs then end with them
        api.delete_job(submitted.kind, submitted.name)
    logs.drain(all_pods=True)
    code = _collect(values, logs, attempt, nodes, ended.exit_code)
    _delete(api, submitted)
    return code


def _delete(api: Api, submitted: Submitted) -> None:
    api.delete_job(submitted.kind, submitted.name)
    api.delete_beside(submitted.name)


SOON_S = 1


class _Watch:
    """Looks at a job and its pods until there is a verdict."""

    def __init__(self, api: Api, submitted: Submitted, nodes: int, logs: Logs, limits: Limits) -> None:
        self._api, self._submitted, self._nodes = api, submitted, nodes
        self._logs, self._limits = logs, limits
        self._selector = submitted.kind.pods.format(name=submitted.name)
        self._pods: dict[str, Object] = {}
        self._begin = time.monotonic()
        self._all_run: float | None = None

    def ended(self) -> Verdict:
        kind, name = self._submitted.kind, self._submitted.name
        while True:
            job = self._api.job(kind, name)
            listed, version = self._api.pods(self._selector)
            for pod in listed:
                self._see(pod)
            found = verdict(kind, job, self._submitted.uid, self._pods.values()) or self._too_late()
            if found is not None:
                return found
            self._changes(version)

    def _changes(self, version: str) -> None:
        """Take in changes of pods for a while, or until there may be a verdict, or all run."""
        # Once a pod has ended, what is still to come is the job's own condition.
        seconds = SOON_S if any(map(has_ended, self._pods.values())) else WATCH_S
        seconds = max(SOON_S, min(seconds, math.ceil(self._left_s())))
        all_run = self._all_run
        try:
            for what, pod in self._api.watch_pods(self._selector, version, seconds):
                self._see(pod)
                if what == "DELETED":
                    self._logs.has_ended(pod["metadata"]["name"])
                if what == "DELETED" or has_ended(pod) or is_hopeless(pod) or self._all_run != all_run:
                    return
        except Refused as error:
            show(f"# watching anew: {error}")

    def _see(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        self._pods[name] = pod
        if has_started(pod):
            self._logs.follow(name)
        if has_ended(pod):
            self._logs.has_ended(name)
        started = sum(map(has_started, self._pods.values()))
        if self._all_run is None and started >= self._nodes:
            self._all_run = time.monotonic()

    def _left_s(self) -> float:
        """The seconds to the limit that holds now, at most those of a watch."""
        begin, limit_s = self._begin, self._limits.pending_s
        if self._all_run is not None:
            begin, limit_s = self._all_run, self._limits.running_s
        return begin + limit_s - time.monotonic() if limit_s else WATCH_S

    def _too_late(self) -> Verdict | None:
        now, limits = time.monotonic(), self._limits
        if self._all_run is not None:
            if limits.running_s and now - self._all_run > limits.running_s:
                return Verdict(TIMED_OUT, f"# ended after {limits.running_s:g} s")
            return None
        if not limits.pending_s or now - self._begin < limits.pending_s:
            return None
        waiting = [pod for pod in self._pods.values() if not has_started(pod)]
        why = why_pending(waiting[0]) if waiting else "the job has no pods: is its queue full?"
        started = sum(map(has_started, self._pods.values()))
        return Verdict(
            CUT_SHORT, f"error: {started} of {self._nodes} pods have started within {limits.pending_s:g} s: {why}"
        )


def has_own_result(attempt: Attempt) -> bool:
    """Whether there is a result of the ranks, not only a note that nobody has waited for them."""
    result = attempt.result()
    return attempt.has_result and not (result and result.failure and result.failure.message == CANCELLED)


def _collect(values: Values, logs: Logs, attempt: Attempt, nodes: int, code: int) -> int:
    """Write the result that came with the log, unless one is there, and judge it by the gates."""
    if not has_own_result(attempt):
        content = logs.result
        if content is None:
            if code == 0:
                claim, path = values.results.claim, f"{values.results.mount_path}/.../{attempt.json.name}"
                show(f"error: no whole result came with the log: it is {path} on the volume of {claim}")
                return int(ExitCode.FAILED)
            return code
        replace_text(attempt.json, content.decode(errors="replace"))
    try:
        result = read_result(attempt.json)
    except UnreadableFile as error:
        show(f"error: {error}")
        return int(ExitCode.FAILED)
    return _judge(values, logs, attempt.json, result, code)


def _judge(values: Values, logs: Logs, path: Path, result: Result, code: int) -> int:
    """A run that has passed, but not its gates, has failed; its measurements stay."""
    if code != 0:
        return code
    num_ranks = result.scenario.num_ranks if result.scenario else result.world_size or 0
    for gate in values.gates:
        missing = sorted(set(range(num_ranks)) - logs.passed[gate.name])
        if not missing:
            show(f"# gate {gate.name}: passed on all {num_ranks} ranks")
            continue
        message = (
            f"gate {gate.name}: {len(missing)} of {num_ranks} ranks, rank {missing[0]} first, have printed no line "
            f"with {gate.pattern!r}"
        )
        show(f"FAILED: {message}")
        failed = replace(
            result, status=Status.FAILED, exit_code=int(ExitCode.FAILED), failure=Failure(message, rank=missing[0])
        )
        ResultFile(path).write(failed)
        return int(ExitCode.FAILED)
    return code
