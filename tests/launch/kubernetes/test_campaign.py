"""The reference's campaign: its cells as pods of 32 nodes with 8 GPUs and 16 EFA devices each, and its gate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from refit.launch.host import Stop, ThisProcess
from refit.launch.kubernetes.launcher import VALUES, KubernetesLauncher
from refit.results.status import Status
from refit.sweep import run
from refit.sweep.selection import select_file
from tests.launch.kubernetes.needs import needs_client

SITE = Path(__file__).resolve().parents[3] / "examples/kubernetes_efa.yaml"

LINE = "host:1:9 [3] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 16 nics)"
"""What every rank logged in the campaign."""


@needs_client
@pytest.mark.parametrize("model", ["kimi_k2", "deepseek_v3"])
def test_a_campaign_of_dispatchers_renders_its_cells(model: str) -> None:
    launcher = KubernetesLauncher(ThisProcess(Stop()), {VALUES: str(SITE)})
    sweep = run.plan(select_file(f"dispatcher_{model}", []), run.Allocation(None, 8, None), "20260604-083049")
    assert [planned.status for planned in sweep.scenarios] == [Status.READY] * 8
    jobs = [run.task(sweep, Path("/nowhere/logs"), planned).job() for planned in sweep.scenarios]
    launcher.check(None, jobs)
    text, note = launcher.manifests(None, jobs)
    assert note == ""
    manifests = list(yaml.safe_load_all(text))
    found = [manifest for manifest in manifests if manifest["kind"] == "Job"]
    assert len(found) == 8
    assert len({manifest["metadata"]["name"] for manifest in found}) == 8
    for manifest in found:
        spec = manifest["spec"]
        assert (spec["completions"], spec["parallelism"]) == (32, 32)
        (container,) = spec["template"]["spec"]["containers"]
        for asked in container["resources"].values():
            assert asked == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "16"}
        assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
        assert "--ranks-per-node=8" in container["args"]
    flags = [manifest["data"]["flags"] for manifest in manifests if manifest["kind"] == "ConfigMap"]
    assert sum("--moe-token-dispatcher-type=flex" in each for each in flags) == 4


def test_its_gate_finds_what_the_ranks_of_the_campaign_logged() -> None:
    (gate,) = KubernetesLauncher(ThisProcess(Stop()), {VALUES: str(SITE)}).values.gates
    assert re.search(gate.pattern, LINE)
    assert not re.search(gate.pattern, LINE.replace("efa", "tcp"))
