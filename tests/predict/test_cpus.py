"""What ranks on CPUs need, and where they would be."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.registry import AUTO
from refit.config.scenario import Scenario
from refit.errors import UsageError
from refit.predict import cpus
from refit.predict.cpus import FORKED, SPAWNED, Machine, check_cpus, check_running, has_gpu, is_on_cpus, this_machine
from refit.predict.dry_run import DryRunOptions, dry_run

GB = 10**9


def scenario(*flags: str) -> Scenario:
    return parse(["--model=tiny", *flags]).scenario


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes is None or machine.memory_bytes > 0


@pytest.mark.parametrize(
    ("flags", "with_gpu", "without"),
    [
        (["--refit-method=gloo"], True, True),
        (["--refit-method=shm"], True, True),
        (["--refit-method=nccl"], False, False),
        (["--refit-method=gloo", "--device=cuda"], False, False),
        ([f"--refit-method={AUTO}"], False, True),
        ([f"--refit-method={AUTO}", "--device=cpu"], True, True),
        ([f"--refit-method={AUTO}", "--device=cuda"], False, False),
    ],
)
def test_where_the_ranks_would_be(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], with_gpu: bool, without: bool
) -> None:
    for there, expected in ((True, with_gpu), (False, without)):
        monkeypatch.setattr(cpus, "has_gpu", lambda there=there: there)
        assert is_on_cpus(scenario(*flags)) is expected


def test_torch_is_asked_for_a_gpu_as_the_ranks_ask() -> None:
    torch = pytest.importorskip("torch")
    assert has_gpu() is torch.cuda.is_available()


@pytest.mark.parametrize("method", ["gloo", "shm", AUTO])
def test_ranks_that_are_started_already_need_room_for_their_weights(method: str) -> None:
    """As under torchrun, which starts the ranks before anything can be checked."""
    found = scenario(f"--refit-method={method}", "--hidden-size=8192", "--num-layers=16", "--moe-layer-freq=1")
    with pytest.raises(
        UsageError, match=r"the weights of 2 ranks .* GB of memory > 4\.00 GB free: plan it with --dry-run"
    ):
        check_running(found, Machine(2, 4 * GB))
    check_running(found, Machine(2, 4000 * GB))
    check_running(found, Machine(2, None))


MANY = ("--refit-method=gloo", "--source-world-size=64", "--destination-world-size=64")
MANY = (*MANY, "--tensor-model-parallel-size=2", "--expert-model-parallel-size=2")
MANY = (*MANY, "--rl-inference-tensor-model-parallel-size=1", "--rl-inference-expert-model-parallel-size=4")


def test_forked_ranks_share_what_each_spawned_one_imports() -> None:
    """128 ranks of a tiny model, on two cores with 8 GB."""
    found = scenario(*MANY)
    run = dry_run(found, DryRunOptions())
    check_cpus(found, run, Machine(2, 8 * GB), FORKED)
    with pytest.raises(UsageError, match=r"128 ranks > 64 for 2 cores, 4\d\.\d+ GB of memory > 8\.00 GB free"):
        check_cpus(found, run, Machine(2, 8 * GB), SPAWNED)
    with pytest.raises(UsageError, match=r"[56]\.\d+ GB of memory > 4\.00 GB free"):
        check_cpus(found, run, Machine(2, 4 * GB), FORKED)
