"""Makes a run of an attempt at a scenario, and creates its objects: all of them, or none."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from refit.errors import RefitError, UsageError
from refit.launch.base import Job
from refit.launch.kubernetes import rules
from refit.launch.kubernetes.api import CONFLICT, Api, Away, Object, Refused, find_jobs
from refit.launch.kubernetes.kinds import KINDS, Kind
from refit.launch.kubernetes.manifests import SUBMISSION, Manifest, PodRun, render
from refit.launch.kubernetes.validation import check_installed, validate
from refit.launch.kubernetes.values import FILES_PATH, Values

FILE_FLAGS = ("--model", "--cluster", "--hf-config")
"""Flags of benchmark_refit.py that may name a file of this machine, which then travels in the ConfigMap."""

FILE_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job as the log of its attempt records it."""

    kind: Kind
    name: str
    uid: str

    def __str__(self) -> str:
        return f"# submitted {self.kind.name} {self.name} {self.uid}"

    @classmethod
    def read(cls, log: Path) -> Submitted | None:
        """The job that an attempt's log names; None where it names none."""
        if not log.exists():
            return None
        with log.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                found = re.fullmatch(r"# submitted (\w+) (\S+) (\S+)", line.rstrip())
                if found and found[1] in KINDS:
                    return cls(KINDS[found[1]], found[2], found[3])
        return None


def pod_run(job: Job, values: Values, submission: str | None = None) -> PodRun:
    """How pods run an attempt. Raises UsageError where its files cannot go into a ConfigMap."""
    folder = f"{values.results.mount_path.rstrip('/')}/{job.run_id}"
    flags, files = _with_files(job.flags)
    own = ("--output-dir=", "--run-name=")
    kept = [flag for flag in flags if not flag.startswith(own)]
    return PodRun(
        name=rules.name_of(job.stem.name),
        run_id=job.run_id,
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        flags=(*kept, f"--output-dir={folder}", f"--run-name={job.stem.name}"),
        folder=folder,
        result=job.stem.name,
        submission=uuid.uuid4().hex if submission is None else submission,
        files=files,
    )


def manifests_of(kind: Kind, values: Values, run: PodRun) -> list[Manifest]:
    """The manifests of a run, held against the types of the API. Raises UsageError."""
    check_installed(kind)
    manifests = render(kind, values, run)
    validate(manifests)
    return manifests


def create(api: Api, kind: Kind, values: Values, run: PodRun) -> Submitted:
    """Create the objects of a run.

    Raises UsageError where another submitter has such a job, or where the cluster does not know the kind. Whatever
    fails, nothing is left that this call has made.
    """
    manifests = manifests_of(kind, values, run)
    if not api.knows(kind):
        raise UsageError(
            f"the cluster has no {kind.plural}.{kind.group}: install the operator, or take --kind Job, which needs none"
        )
    for _, other in find_jobs(api, run.run_id):
        if other["metadata"]["name"] == run.name and not _is_ours(other, run):
            raise _taken(run)
    *beside, job = manifests
    made: list[str] = []
    try:
        for manifest in beside:
            _create(api, manifest, None, run)
            made.append(manifest["kind"])
        uid = _create(api, job, kind, run)["metadata"]["uid"]
    except Away:
        raise
    except (_Taken, RefitError) as error:
        api.delete_beside(run.name, made)
        raise (_taken(run) if isinstance(error, _Taken) else error) from None
    return Submitted(kind, run.name, uid)


class _Taken(Exception):
    """An object of another submitter has the name."""


def _create(api: Api, manifest: Manifest, kind: Kind | None, run: PodRun) -> Object:
    """Create one object, or find that an earlier request for it, whose answer was lost, has."""
    try:
        return api.create(manifest, kind)
    except Refused as error:
        if error.status != CONFLICT:
            raise RefitError(f"the cluster refuses {manifest['kind']} {run.name}: {error}") from None
    there = api.job(kind, run.name) if kind is not None else api.beside(manifest["kind"], run.name)
    if there is None or not _is_ours(there, run):
        raise _Taken
    return there


def _is_ours(there: Object, run: PodRun) -> bool:
    annotations = there["metadata"].get("annotations", {})
    return bool(run.submission) and annotations.get(SUBMISSION) == run.submission


def _taken(run: PodRun) -> UsageError:
    return UsageError(
        f"{run.name} is there already, from another submitter: `refit sweep cancel {run.run_id} --launcher kubernetes "
        "--values FILE` ends it, or take another --run-id"
    )


def _with_files(flags: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Flags whose files of this machine are named as pods have them, and the texts of these files."""
    found, files = [], dict[str, str]()
    words = list(flags)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in FILE_FLAGS and not equals and words:
            value = words.pop(0)
        path = Path(value)
        if path.is_dir() and (path / "config.json").is_file():
            path = path / "config.json"
        if name in FILE_FLAGS and path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            _add(files, path)
            value = f"{FILES_PATH}/{path.name}"
        found.append(f"{name}={value}" if name in FILE_FLAGS else word)
    return tuple(found), files


def _add(files: dict[str, str], path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not FILE_KEY.fullmatch(path.name):
        raise UsageError(f"{path.name!r} cannot be a key of a ConfigMap: use letters, digits, -, _ and .")
    if files.get(path.name, text) != text or path.name == "flags":
        raise UsageError(f"two files of one scenario are called {path.name}: rename one")
    files[path.name] = text
