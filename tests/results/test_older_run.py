"""A run of an older build: result files of version 3, a sweep file of version 2 and what they say of settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.predict.fsdp2 import Fsdp2Options
from refit.predict.vllm.options import VllmOptions
from refit.results.identity import foreign
from refit.results.result import decoded_result, read_result
from refit.results.status import Status
from refit.results.sweep import Sweep
from refit.results.upgrade import RESULT_VERSION, SWEEP_VERSION
from refit.transport.one_sided.nixl.options import NixlOptions
from refit.transport.one_sided.options import NvshmemOptions, ShmOptions

OLDER = Path(__file__).parent / "golden/older_run"
"""Of the build before settings were one value: a sweep of three scenarios, `left` is the one without a result."""


def test_its_sweep_has_every_setting_in_its_new_place() -> None:
    sweep = Sweep.read(OLDER / "old_sweep.json")
    assert sweep.schema_version == SWEEP_VERSION
    done, chosen, left = (sweep.scenario(name) for name in ("done", "chosen", "left"))
    assert (done.source, left.destination) == (done.scenario.source, left.scenario.destination)  # type: ignore[union-attr]
    assert done.source is not None
    assert chosen.destination is not None
    assert left.destination is not None
    assert done.source.options == Fsdp2Options(2)
    assert chosen.destination.options == VllmOptions(data_parallel_size=2)
    assert left.destination.options == VllmOptions(replicas=2)
    for planned in sweep.scenarios:
        assert planned.scenario == parse(planned.flags).scenario, planned.name
    assert done.scenario is not None
    assert chosen.scenario is not None
    assert done.scenario.method_options == {"shm": ShmOptions("direct")}
    assert chosen.scenario.method_options == {"shm": ShmOptions(), "nvshmem": NvshmemOptions(), "nixl": NixlOptions()}


@pytest.mark.parametrize("name", ["done", "chosen"])
def test_its_results_are_those_of_the_scenarios(name: str) -> None:
    result = read_result(OLDER / f"old_{name}.json")
    assert (result.schema_version, result.status) == (RESULT_VERSION, Status.OK)
    assert foreign(Sweep.read(OLDER / "old_sweep.json").scenario(name), result) is None
    assert result.scenario is not None
    assert result.scenario.own_options == ShmOptions("direct" if name == "done" else "ring")


@pytest.mark.parametrize("old", [3, "gloo", ["gloo"], {"a": 1}])
@pytest.mark.parametrize("place", ["scenario", "source", "format", "method"])
def test_what_is_malformed_is_refused_in_words(old: object, place: str) -> None:
    content = json.loads((OLDER / "old_done.json").read_text())
    scenario = content["scenario"]
    holder = {"scenario": content, "source": scenario, "format": scenario["source"], "method": scenario}[place]
    holder[place] = old
    if place in ("format", "method") and old == "gloo":
        return
    with pytest.raises(ValueError, match=r"Expected|missing|schema version 3"):
        decoded_result(content)
