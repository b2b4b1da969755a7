"""A small API server for tests: the paths and events that this suite uses, over HTTP, and a controller in Python.

It refuses unknown fields by the client's own constructors, which this suite's validator does not use. What pods do is a
function of the test, so that they can be commands that run, or what a cluster does to them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]
Behaviour = Callable[["Cluster", Object], None]
"""What a job's controller does, in a thread of its own, once the job is there."""

OBJECTS = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)/namespaces/default/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?"
)
LOG = re.compile(r"/api/v1/namespaces/default/pods/(?P<name>[^/]+)/log")
PODS_OF = {
    "jobs": "batch.kubernetes.io/job-name",
    "pytorchjobs": "training.kubeflow.org/job-name",
    "trainjobs": "jobset.sigs.k8s.io/jobset-name",
    "jobsets": "jobset.sigs.k8s.io/jobset-name",
}


class Cluster:
    """One namespace, `default`. `kinds` are the plurals of jobs that it knows."""

    def __init__(self, behave: Behaviour, kinds: tuple[str, ...] = tuple(PODS_OF)) -> None:
        self.behave, self.kinds = behave, kinds
        self.objects: dict[tuple[str, str], Object] = {}
        self.pods: dict[str, Object] = {}
        self.logs: dict[str, list[str]] = {}
        self.events: list[tuple[int, str, Object]] = []
        self.requests: list[str] = []
        self.forgets: int = 0
        """Versions before this one have been forgotten: a watch that begins there gets 410."""
        self.is_away = False
        self._version = 0
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path) -> Path:
        server = f"http://127.0.0.1:{self._server.server_port}"
        named = {"clusters": "cluster", "users": "user", "contexts": "context"}
        content = {"cluster": {"server": server}, "user": {}, "context": {"cluster": "test", "user": "test"}}
        config = {key: [{"name": "test", value: content[value]}] for key, value in named.items()}
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "test", **config}))
        return path

    # What behaviours do.

    def add_pod(self, job: Object, node: int, labels: Object | None = None) -> str:
        """A pod of a job, pending. Returns its name."""
        name = f"{job['metadata']['name']}-{node}-x{len(self.events)}"
        labels = {PODS_OF[job["plural"]]: job["metadata"]["name"], **(labels or {})}
        pod = {"metadata": {"name": name, "labels": labels}, "spec": {}, "status": {"phase": "Pending"}}
        self.logs[name] = []
        self._change(name, pod, "ADDED")
        return name

    def set_pod(self, name: str, phase: str, state: Object | None = None, **status: Any) -> None:
        found: Object = {"phase": phase, **status}
        if state is not None:
            found["containerStatuses"] = [{"name": "node", "state": state}]
        if name in self.pods:
            self._change(name, {**self.pods[name], "status": found}, "MODIFIED")

    def run_pod(self, name: str) -> None:
        self.set_pod(name, "Running", {"running": {"startedAt": now()}})

    def end_pod(self, name: str, code: int, reason: str = "Error", **status: Any) -> None:
        state = {"terminated": {"exitCode": code, "reason": reason if code else "Completed", "finishedAt": now()}}
        self.set_pod(name, "Failed" if code else "Succeeded", state, **status)

    def delete_pod(self, name: str) -> None:
        if name in self.pods:
            self._change(name, self.pods[name], "DELETED")

    def say(self, pod: str, *lines: str) -> None:
        with self._changed:
            self.logs[pod] += [f"{now()} {line}" for line in lines]
            self._changed.notify_all()

    def set_job(self, job: Object, condition: str, reason: str = "", message: str = "") -> None:
        found = {"type": condition, "status": "True", "reason": reason, "message": message}
        with self._changed:
            job.setdefault("status", {}).setdefault("conditions", []).append(found)

    def is_there(self, job: Object) -> bool:
        return (job["plural"], job["metadata"]["name"]) in self.objects

    def wait(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def names(self, plural: str) -> list[str]:
        return [name for kind, name in self.objects if kind == plural]

    def _change(self, name: str, pod: Object, what: str) -> None:
        with self._changed:
            self._version += 1
            pod = {**pod, "metadata": {**pod["metadata"], "resourceVersion": str(self._version)}}
            if what == "DELETED":
                del self.pods[name]
            else:
                self.pods[name] = pod
            self.events.append((self._version, what, pod))
            self._changed.notify_all()

    # The server.

    def create(self, plural: str, manifest: Object, query: dict[str, str]) -> tuple[int, Object]:
        if unknown := unknown_fields(manifest):
            return 400, status(400, f'strict decoding error: unknown field "{unknown}"')
        if query.get("fieldValidation") != "Strict":
            return 400, status(400, "this server wants fieldValidation=Strict, as a test")
        name = manifest["metadata"]["name"]
        with self._changed:
            if (plural, name) in self.objects:
                return 409, status(409, f'{plural} "{name}" already exists')
            self._version += 1
            metadata = {**manifest["metadata"], "uid": f"uid-{self._version}"}
            made = {**manifest, "metadata": metadata, "plural": plural}
            self.objects[plural, name] = made
        if plural in PODS_OF:
            threading.Thread(target=self.behave, args=(self, made), daemon=True).start()
        return 201, made

    def delete(self, plural: str, name: str, query: dict[str, str]) -> tuple[int, Object]:
        with self._changed:
            if self.objects.pop((plural, name), None) is None:
                return 404, status(404, f'{plural} "{name}" not found')
        if plural in PODS_OF and query.get("propagationPolicy") == "Background":
            for pod in [pod for pod in self.pods if self.pods[pod]["metadata"]["labels"].get(PODS_OF[plural]) == name]:
                self.delete_pod(pod)
        return 200, status(200, "deleted")

    def answer(self, method: str, path: str, query: dict[str, str], body: Object | None) -> tuple[int, Object]:
        found = OBJECTS.fullmatch(path)
        if found is None:
            return 404, status(404, f"the server could not find the requested resource {path}")
        plural, name = found["plural"], found["name"]
        if plural in PODS_OF and plural not in self.kinds:
            return 404, status(404, "the server could not find the requested resource")
        if method == "POST":
            assert body is not None
            return self.create(plural, body, query)
        if method == "DELETE":
            return self.delete(plural, name, query)
        if name is not None:
            there = self.objects.get((plural, name))
            return (200, there) if there else (404, status(404, f'{plural} "{name}" not found'))
        objects = self.pods.values() if plural == "pods" else [o for (p, _), o in self.objects.items() if p == plural]
        items = [each for each in objects if selected(each, query.get("labelSelector", ""))]
        return 200, {"metadata": {"resourceVersion": str(self._version)}, "items": items}

    def watch(self, query: dict[str, str], write: Callable[[Object], None]) -> None:
        seen, deadline = int(query["resourceVersion"]), time.monotonic() + float(query["timeoutSeconds"])
        if seen < self.forgets:
            write({"type": "ERROR", "object": {"code": 410, "message": f"too old resource version: {seen}"}})
            return
        while time.monotonic() < deadline and not self.is_away:
            with self._changed:
                self._changed.wait(0.05)
                new = [event for event in self.events if event[0] > seen]
            for version, what, pod in new:
                seen = version
                if selected(pod, query.get("labelSelector", "")):
                    write({"type": what, "object": pod})

    def follow(self, name: str, write: Callable[[str], None]) -> None:
        sent = 0
        while not self.is_away:
            is_last = self.pods.get(name, {}).get("status", {}).get("phase") != "Running"
            with self._changed:
                new, sent = self.logs[name][sent:], len(self.logs[name])
            for line in new:
                write(line)
            if is_last:
                return
            time.sleep(0.02)

    def _handler(cluster) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and content are two packets

            def handle_any(self) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                cluster.requests.append(f"{self.command} {url.path}")
                if cluster.is_away:
                    return self._send(503, status(503, "the server is currently unable to handle the request"))
                if log := LOG.fullmatch(url.path):
                    return self._stream(lambda write: cluster.follow(log["name"], lambda line: write(f"{line}\n")))
                if query.get("watch") == "true":
                    return self._stream(
                        lambda write: cluster.watch(query, lambda event: write(f"{json.dumps(event)}\n"))
                    )
                return self._send(*cluster.answer(self.command, url.path, query, body))

            do_GET = do_POST = do_DELETE = handle_any

            def _send(self, code: int, content: Object) -> None:
                text = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def _stream(self, produce: Callable[[Callable[[str], None]], None]) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()

                def write(text: str) -> None:
                    content = text.encode()
                    self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
                    self.wfile.flush()

                try:
                    produce(write)
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:  # the client has gone
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def now() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}000Z"


def status(code: int, message: str) -> Object:
    return {"kind": "Status", "code": code, "message": message}


def selected(item: Object, selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    return all(
        labels.get(key) == value for key, _, value in (each.partition("=") for each in selector.split(",") if each)
    )


def unknown_fields(manifest: Object) -> str:
    """The first field that the types of the client, or of the trainer's package, lose or refuse; "" without one."""
    import kubeflow_trainer_api.models as trainer
    from kubernetes.client import models
    from pydantic import ValidationError

    kind = manifest["kind"]
    if kind in ("ConfigMap", "Service", "Job"):
        try:
            getattr(models, f"V1{kind}").model_validate(manifest)
        except ValidationError as error:
            return ".".join(map(str, error.errors()[0]["loc"]))
        return ""
    types = {"TrainJob": trainer.TrainerV1alpha1TrainJob, "JobSet": trainer.JobsetV1alpha2JobSet}
    if kind in types:
        return lost(manifest, json.loads(json.dumps(types[kind].from_dict(manifest).to_dict(), default=str)))
    return ""


def lost(before: Any, after: Any, place: str = "") -> str:
    """The first key of `before` that is not in `after`. Quantities come back as objects, without keys of their own."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key not in after:
                return f"{place}.{key}"
            if found := lost(value, after[key], f"{place}.{key}"):
                return found
    if isinstance(before, list) and isinstance(after, list):
        for number, pair in enumerate(zip(before, after, strict=True)):
            if found := lost(*pair, f"{place}[{number}]"):
                return found
    return ""
