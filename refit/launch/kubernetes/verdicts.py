"""What has become of a job, from its conditions and its pods: pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refit.launch.host import CUT_SHORT, DISRUPTED
from refit.launch.kubernetes.kinds import Kind

Object = dict[str, Any]

DISRUPTIONS = (
    "Evicted",
    "Preempting",
    "Shutdown",
    "NodeShutdown",
    "NodeLost",
    "Terminated",
    "UnexpectedAdmissionError",
)
"""Reasons of pods that their node has ended. Newer nodes say so in the condition DisruptionTarget too."""

HOPELESS = ("ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError")
"""What a container waits for that does not come."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a job has ended: an exit code, and a line for its log; "" where there is nothing to say."""

    exit_code: int
    line: str = ""


def verdict(kind: Kind, job: Object | None, uid: str, pods: Iterable[Object]) -> Verdict | None:
    """What has become of a job; None while it runs or waits."""
    if job is None or job["metadata"]["uid"] != uid:
        return Verdict(CUT_SHORT, "error: the job was deleted from outside")
    conditions = {
        each["type"]: each for each in job.get("status", {}).get("conditions", ()) if each["status"] == "True"
    }
    if any(name in conditions for name in kind.complete):
        return Verdict(0)
    pods = list(pods)
    if kind.failed in conditions:
        return _disrupted(pods) or _failed(pods) or _by_condition(conditions[kind.failed])
    return _hopeless(pods)


def has_started(pod: Object) -> bool:
    """Whether the pod's container has started, so that it has a log."""
    return any("running" in state or "terminated" in state for state in _states(pod))


def has_ended(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_hopeless(pod: Object) -> bool:
    """Whether the pod's container waits for what does not come."""
    return _hopeless([pod]) is not None


def why_pending(pod: Object) -> str:
    """Why a pod has not started, as the scheduler or the node says."""
    for each in pod.get("status", {}).get("conditions", ()):
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            return f"{each.get('reason', '')}: {each.get('message', '')}"
    for state in _states(pod):
        if "waiting" in state:
            return str(state["waiting"].get("reason", "waiting"))
    return "it waits"


def _disrupted(pods: list[Object]) -> Verdict | None:
    for pod in pods:
        status = pod.get("status", {})
        reason, message = status.get("reason", ""), status.get("message", "")
        for each in status.get("conditions", ()):
            if each.get("type") == "DisruptionTarget" and each.get("status") == "True":
                reason, message = each.get("reason", "DisruptionTarget"), each.get("message", message)
                break
        else:
            if reason not in DISRUPTIONS:
                continue
        return Verdict(DISRUPTED, f"error: {_name(pod)} was taken away: {reason}: {_line(message)}")
    return None


def _failed(pods: list[Object]) -> Verdict | None:
    """The container that failed first."""
    ended = [
        (str(state["terminated"].get("finishedAt", "")), pod, state["terminated"])
        for pod in pods
        for state in _states(pod)
        if "terminated" in state and state["terminated"].get("exitCode") != 0
    ]
    if not ended:
        return None
    _, pod, state = min(ended, key=lambda each: each[0])
    code, reason = int(state.get("exitCode", 1)), state.get("reason", "Error")
    # What its own log says is better, unless Kubernetes ended it.
    mark = "error: " if reason == "OOMKilled" else "# "
    return Verdict(code, f"{mark}{_name(pod)} ended with exit code {code}: {reason}")


def _by_condition(condition: Object) -> Verdict:
    return Verdict(1, f"error: the job failed: {condition.get('reason', '')}: {_line(condition.get('message', ''))}")


def _hopeless(pods: list[Object]) -> Verdict | None:
    for pod in pods:
        for state in _states(pod):
            waiting = state.get("waiting", {})
            if waiting.get("reason") in HOPELESS:
                line = f"error: {_name(pod)} cannot start: {waiting['reason']}: {_line(waiting.get('message', ''))}"
                return Verdict(1, line)
    return None


def _states(pod: Object) -> list[Object]:
    return [each.get("state", {}) for each in pod.get("status", {}).get("containerStatuses", ())]


def _name(pod: Object) -> str:
    node = pod.get("spec", {}).get("nodeName")
    return f"pod {pod['metadata']['name']}{f' on {node}' if node else ''}"


def _line(text: str) -> str:
    return " ".join(str(text).split())
