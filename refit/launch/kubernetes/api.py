"""What this suite asks of a cluster's API, through the official client: objects as they are in JSON.

A server that cannot be reached for a while, or has too much to do, is asked again for `PATIENCE_S`.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from refit.errors import RefitError, UsageError, first_line
from refit.launch.kubernetes.kinds import KINDS, Kind
from refit.launch.kubernetes.manifests import RUN_LABEL
from refit.launch.kubernetes.validation import INSTALL
from refit.launch.kubernetes.values import Values
from refit.report.terminal.console import show

T = TypeVar("T")
Object = dict[str, Any]

PATIENCE_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
TIMEOUT_S = 30.0
"""How long one request may take, that of a stream apart."""

LOG_TIMEOUT_S = 600.0
"""How long a log may be silent before it is asked for anew."""

WATCH_S = 5
"""How long one watch lasts. Between two of them the job itself is looked at, and the time."""

NOT_FOUND, CONFLICT, GONE = 404, 409, 410
FOR_A_WHILE = (429, 500, 502, 503, 504)
"""Answers that another one may follow."""


class Refused(RefitError):
    """The server has refused a request. `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Away(RefitError):
    """The server has not answered for too long. What it was asked for may have been done."""


class Api:
    """One namespace of a cluster, as the kubeconfig or the pod that this runs in knows it."""

    def __init__(self, values: Values, patience_s: float = PATIENCE_S) -> None:
        """Raises UsageError where the client is not installed, or no cluster is configured."""
        try:
            from kubernetes import client, config
        except ImportError:
            raise UsageError(f"the launcher kubernetes needs the package kubernetes: {INSTALL}") from None
        self.namespace = values.namespace
        self._patience_s = patience_s
        settings = client.Configuration()
        try:
            # The client reads the variable when it is imported; what it says now counts.
            file = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
            if values.context is None and not os.environ.get("KUBECONFIG") and not os.path.exists(file):
                config.load_incluster_config(client_configuration=settings)
            else:
                config.load_kube_config(config_file=file, context=values.context, client_configuration=settings)
        except Exception as error:  # the client raises many kinds for files that are missing or malformed
            raise UsageError(
                f"no cluster is configured ({first_line(error)}): set KUBECONFIG, or `context` in the values"
            ) from None
        settings.retries = False  # `_asked` says so when it waits
        connection = client.ApiClient(settings)
        self._core = client.CoreV1Api(connection)
        self._objects = client.CustomObjectsApi(connection)
        self._error = client.ApiException

    def create(self, manifest: Object, kind: Kind | None = None) -> Object:
        """Create an object; the server refuses unknown fields. Raises Refused, CONFLICT where its name is taken."""
        if kind is not None:
            name = (kind.group, kind.version, self.namespace, kind.plural)
            return self._asked(
                lambda: self._objects.create_namespaced_custom_object(
                    *name, manifest, field_validation="Strict", _request_timeout=TIMEOUT_S
                )
            )
        creates = {
            "ConfigMap": self._core.create_namespaced_config_map,
            "Service": self._core.create_namespaced_service,
        }
        return self._raw(creates[manifest["kind"]], self.namespace, manifest, field_validation="Strict")

    def knows(self, kind: Kind) -> bool:
        """Whether the cluster has this kind of object."""
        try:
            self.jobs(kind, "", limit=1)
        except Refused as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    def jobs(self, kind: Kind, selector: str, limit: int | None = None) -> list[Object]:
        """The jobs of a kind with these labels."""
        more = {"limit": limit} if limit else {}
        found = self._asked(
            lambda: self._objects.list_namespaced_custom_object(
                kind.group,
                kind.version,
                self.namespace,
                kind.plural,
                label_selector=selector,
                _request_timeout=TIMEOUT_S,
                **more,
            )
        )
        return list(found["items"])

    def job(self, kind: Kind, name: str) -> Object | None:
        """A job; None where there is none."""
        try:
            found: Object = self._asked(
                lambda: self._objects.get_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, name, _request_timeout=TIMEOUT_S
                )
            )
            return found
        except Refused as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def delete_job(self, kind: Kind, name: str) -> bool:
        """Delete a job with its pods. Returns whether there was one."""
        return self._deleted(
            lambda: self._objects.delete_namespaced_custom_object(
                kind.group,
                kind.version,
                self.namespace,
                kind.plural,
                name,
                propagation_policy="Background",  # a Job's own default leaves its pods
                _request_timeout=TIMEOUT_S,
            )
        )

    def delete_beside(self, name: str, kinds: Sequence[str] = ("Service", "ConfigMap")) -> None:
        """Delete the service and the ConfigMap of a job, or one of them."""
        deletes = {
            "ConfigMap": self._core.delete_namespaced_config_map,
            "Service": self._core.delete_namespaced_service,
        }
        for kind in kinds:
            self._deleted(functools.partial(deletes[kind], name, self.namespace, _request_timeout=TIMEOUT_S))

    def beside(self, kind: str, name: str) -> Object | None:
        """The ConfigMap or the service of a job; None where there is none."""
        reads = {
            "ConfigMap": self._core.read_namespaced_config_map,
            "Service": self._core.read_namespaced_service,
        }
        try:
            return self._raw(reads[kind], name, self.namespace)
        except Refused as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def names_beside(self, run_id: str) -> set[str]:
        """The names of the ConfigMaps of a run: of its jobs, and of jobs that are gone."""
        listed = self._raw(
            self._core.list_namespaced_config_map, self.namespace, label_selector=f"{RUN_LABEL}={run_id}"
        )
        return {each["metadata"]["name"] for each in listed["items"]}

    def pods(self, selector: str) -> tuple[list[Object], str]:
        """Pods, and the version of the list, from which a watch goes on."""
        found = self._raw(self._core.list_namespaced_pod, self.namespace, label_selector=selector)
        return list(found["items"]), str(found["metadata"].get("resourceVersion", ""))

    def watch_pods(self, selector: str, version: str, seconds: int) -> Iterator[tuple[str, Object]]:
        """Changes of pods since `version`, as (ADDED, MODIFIED or DELETED, pod), for `seconds`.

        Raises Refused: GONE where the server has forgotten that version. A connection that breaks ends it.
        """
        import urllib3

        try:
            answer = self._core.list_namespaced_pod(
                self.namespace,
                label_selector=selector,
                resource_version=version,
                watch=True,
                timeout_seconds=seconds,
                _preload_content=False,
                _request_timeout=(TIMEOUT_S, seconds + TIMEOUT_S),
            )
            for line in _lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise Refused(str(status.get("message", "the watch failed")), int(status.get("code", GONE)))
                yield event["type"], event["object"]
        except self._error as error:
            if error.status == GONE:
                raise Refused(_message(error), GONE) from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            return  # the next request says whether the server is away

    def log(self, pod: str, since: datetime | None) -> Iterator[tuple[str, str]]:
        """Lines of a pod's log as (time, line), followed until its container ends or the connection breaks."""
        import urllib3

        more = {}
        if since is not None:
            ago_s = (datetime.now(timezone.utc) - since + timedelta(seconds=2)).total_seconds()
            more["since_seconds"] = max(1, int(ago_s))
        try:
            answer = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                follow=True,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(TIMEOUT_S, LOG_TIMEOUT_S),
                **more,
            )
            for line in _lines(answer):
                time_, _, text = line.partition(" ")
                yield time_, text
        except (self._error, urllib3.exceptions.HTTPError, OSError):
            return

    def _raw(self, call: Callable[..., Any], *args: Any, **more: Any) -> Object:
        """An answer as it is in JSON: the client's types would drop what they do not know."""
        answer = self._asked(lambda: call(*args, _preload_content=False, _request_timeout=TIMEOUT_S, **more))
        found: Object = json.loads(answer.data)
        return found

    def _deleted(self, call: Callable[[], Any]) -> bool:
        try:
            self._asked(call)
        except Refused as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    def _asked(self, call: Callable[[], T]) -> T:
        """The answer of the server, which may be away for a while. Raises Refused, or Away once patience ends."""
        import urllib3

        begin, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return call()
            except self._error as error:
                if error.status not in FOR_A_WHILE:
                    raise Refused(_message(error), int(error.status or 0)) from None
                reason = _message(error)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = first_line(error)
            waited_s = time.monotonic() - begin
            if waited_s > self._patience_s:
                raise Away(
                    f"the cluster's API has not answered for {waited_s:.0f} s: {reason}: its jobs still run, go on "
                    "with --resume"
                )
            show(f"# the cluster's API does not answer ({reason}), trying again")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _lines(answer: Any) -> Iterator[str]:
    """Complete lines of a streamed answer."""
    rest = b""
    try:
        for part in answer.stream(amt=None, decode_content=False):
            *lines, rest = (rest + part).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines if line)
    finally:
        answer.close()  # what is left unread must not be the next answer


def _message(error: Any) -> str:
    """What the server says, in one line."""
    try:
        text = str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        text = str(error.reason)
    return " ".join(text.split())


def find_jobs(api: Api, run_id: str) -> list[tuple[Kind, Object]]:
    """The jobs of a run, of every kind that the cluster has."""
    found: list[tuple[Kind, Object]] = []
    for kind in KINDS.values():
        try:
            found += [(kind, job) for job in api.jobs(kind, f"{RUN_LABEL}={run_id}")]
        except Refused as error:
            if error.status != NOT_FOUND:
                raise
    return found
