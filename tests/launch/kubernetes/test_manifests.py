"""Manifests of every kind and case beside golden files, and a validator that no typo passes, at any depth."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from refit.errors import UsageError
from refit.launch.kubernetes.kinds import KINDS
from refit.launch.kubernetes.manifests import PodRun, as_yaml, render
from refit.launch.kubernetes.validation import check_installed, validate
from refit.launch.kubernetes.values import Gate, Mount, Toleration, Values
from tests.launch.kubernetes.needs import needs_client

GOLDEN = Path(__file__).with_name("golden")

PLAIN = Values(image="registry/refit:1", results=Mount("shared", "/results"))
FULL = Values(
    image="registry/refit@sha256:0123",
    results=Mount("fsx", "/fsx", sub_path="refit"),
    namespace="bench",
    volumes=(Mount("models", "/models", read_only=True),),
    shm="256Gi",
    resources={"vpc.amazonaws.com/efa": "16", "hugepages-2Mi": "5120Mi", "cpu": "96", "memory": "1500Gi"},
    env={"FI_PROVIDER": "efa", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"},
    capabilities=("IPC_LOCK",),
    node_selector={"node.kubernetes.io/instance-type": "p6-b300.48xlarge"},
    tolerations=(Toleration(), Toleration("nvidia.com/gpu", "present", "NoSchedule")),
    image_pull_secrets=("registry",),
    service_account="bench",
    kueue_queue="reserved",
    rendezvous="c10d",
    gates=(Gate("efa", "Selected provider is efa"),),
)
CASES = {
    "plain": PLAIN,
    "full": FULL,
    "kai": Values(image="registry/refit:1", results=Mount("shared", "/results"), kai_queue="team", host_network=True),
}


def pod_run(nodes: int = 2, **more: Any) -> PodRun:
    flags = ("--model=tiny", "--refit-method=gloo", "--output-dir=/results/run", "--run-name=run_a")
    given = {"name": "run-a", "run_id": "run", "result": "run_a", "folder": "/results/run", "submission": "0123"}
    return PodRun(nodes=nodes, ranks_per_node=8, flags=flags, **{**given, **more})


def rendered(kind: str, case: str, nodes: int = 2) -> list[dict[str, Any]]:
    return render(KINDS[kind], CASES[case], pod_run(nodes))


KNOWN = [(kind, case) for kind in KINDS for case in CASES if (kind, case) != ("TrainJob", "kai")]


@pytest.mark.parametrize(("kind", "case"), KNOWN)
def test_manifests_are_those_of_the_golden_files(kind: str, case: str) -> None:
    """Delete a golden file to have it written again; then read it."""
    text, path = as_yaml(rendered(kind, case)), GOLDEN / f"{kind}_{case}.yaml"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path.name} was missing: read it, and commit it")
    assert text == path.read_text(encoding="utf-8")
    assert list(yaml.safe_load_all(text)) == rendered(kind, case)


@needs_client
@pytest.mark.parametrize(("kind", "case"), KNOWN)
def test_the_types_of_the_api_know_every_field(kind: str, case: str) -> None:
    for nodes in (1, 2, 32):
        validate(rendered(kind, case, nodes))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every mapping whose keys are fields, not names of a user's own."""
    own = {"labels", "annotations", "data", "requests", "limits", "nodeSelector", "selector"}
    if isinstance(content, dict):
        if not path or path[-1] not in own:
            yield path
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from places(value, (*path, number))


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        content = content[step]
    return content


@needs_client
@pytest.mark.parametrize(("kind", "case"), [(kind, "full") for kind in KINDS] + [("Job", "kai"), ("PyTorchJob", "kai")])
def test_a_typo_at_any_depth_is_refused(kind: str, case: str) -> None:
    manifests = rendered(kind, case)
    num_typos = 0
    for number, manifest in enumerate(manifests):
        for path in places(manifest):
            for key in list(at(manifest, path)):
                planted = copy.deepcopy(manifests)
                mapping = at(planted[number], path)
                mapping[f"{key}s"] = mapping.pop(key)
                with pytest.raises(UsageError):
                    validate(planted)
                added = copy.deepcopy(manifests)
                at(added[number], path)[f"{key}x"] = "a"
                with pytest.raises(UsageError, match=f"no field '{key}x'|unknown|is not known"):
                    validate(added)
                num_typos += 2
    assert num_typos > 100


@needs_client
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "template", "spec", "restartPolicy"), "Nevr", "restartPolicy must be Never or OnFailure or Always"),
        (("kind",), "Jobs", "kind 'Jobs' is not known"),
        (("apiVersion",), "batch/v2", "apiVersion must be batch/v1"),
        (("spec", "template", "spec", "containers"), [], "containers is empty"),
        (("spec", "completions"), "2", "completions must be"),
        (("spec", "template", "spec", "hostNetwork"), "true", "hostNetwork must be"),
        (("spec", "template", "spec", "containers", 0, "image"), None, "image is null"),
        (("spec", "template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu"), 8, "must be"),
        (
            ("spec", "template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu"),
            "8 GPUs",
            "no quantity",
        ),
    ],
)
def test_a_wrong_value_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    manifests = rendered("Job", "plain")
    at(manifests[-1], path[:-1])[path[-1]] = value
    with pytest.raises(UsageError, match=message):
        validate(manifests)


@needs_client
def test_a_field_that_is_missing_is_refused() -> None:
    for path in [("spec", "template"), ("spec", "template", "spec", "containers"), ("spec",)]:
        manifests = rendered("Job", "plain")
        del at(manifests[-1], path[:-1])[path[-1]]
        if path == ("spec",):
            validate(manifests)  # the types have it as one that may be left out
            continue
        with pytest.raises(UsageError, match=f"{path[-1]} is missing"):
            validate(manifests)


@needs_client
@pytest.mark.parametrize(("kind", "module"), [("TrainJob", "kubeflow_trainer_api"), ("Job", "kubernetes")])
def test_a_kind_that_what_is_installed_does_not_know(monkeypatch: pytest.MonkeyPatch, kind: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"kind {kind} needs the package {module}, which is missing: pip install 'refit-benchmark\[kubernetes\]'"
    with pytest.raises(UsageError, match=message):
        check_installed(KINDS[kind])


def test_a_job_relies_on_what_its_operator_sets() -> None:
    """What stands in `$(...)` comes from the operator, or from the manifest itself."""
    sets = {
        "Job": {"JOB_COMPLETION_INDEX"},
        "JobSet": {"JOB_COMPLETION_INDEX"},
        "PyTorchJob": {"PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"},
        "TrainJob": {"PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"},
    }
    for kind in KINDS:
        text = as_yaml(rendered(kind, "plain")[-1:])
        used = {part.partition(")")[0] for part in text.split("$(")[1:]}
        assert used == sets[kind] | {"REFIT_POD_IP"}
        assert "name: REFIT_POD_IP" in text


def test_a_trainjob_cannot_have_what_its_runtime_has() -> None:
    with pytest.raises(UsageError, match="host_network cannot be set in a TrainJob: set it in the runtime torch-dist"):
        rendered("TrainJob", "kai")


@pytest.mark.parametrize(("kind", "most"), [("Job", 54), ("PyTorchJob", 53), ("TrainJob", 47), ("JobSet", 47)])
def test_a_name_that_is_too_long_is_refused_with_the_rule(kind: str, most: int) -> None:
    render(KINDS[kind], PLAIN, pod_run(32, name="a" * most))
    with pytest.raises(UsageError, match=f"has {most + 1} characters, {most} are the most for a {kind} .a DNS label"):
        render(KINDS[kind], PLAIN, pod_run(32, name="a" * (most + 1)))


def test_files_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"have 1,048,6.. bytes, a ConfigMap takes 1,048,576"):
        render(KINDS["Job"], PLAIN, pod_run(files={"model.yaml": "a" * (1 << 20)}))
