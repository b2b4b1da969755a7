"""The nccl_m2n baseline without GPUs: when it is waived, and which parts of the weights it hands to the library."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from refit.bench import environment
from refit.bench.engines import nccl_m2n
from refit.bench.engines.nccl_m2n import LIMITS, NcclM2nEngine
from refit.cli.parsing import parse
from refit.errors import UnavailableError
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.meshes import Mesh, Reshard
from refit.plan.sharding import TensorSpec
from refit.predict.sides import PlannedSides
from refit.transport.ranks import Ranks

FC1 = TensorSpec("experts.linear_fc1.weight", (2, 8, 3), "bfloat16", stacked=True)


def engine(device: str) -> NcclM2nEngine:
    argv = ["--model", "tiny", "--tensor-model-parallel-size", "1", "--rl-inference-tensor-model-parallel-size", "1"]
    return NcclM2nEngine(parse([*argv, "--refit-method", "gloo"]).scenario, torch.device(device))


def missing(device: str) -> str:
    with pytest.raises(UnavailableError) as raised:
        engine(device).check_available()
    return str(raised.value)


def test_it_is_waived_on_cpus() -> None:
    assert missing("cpu") == "nccl_m2n moves memory of GPUs only, the models are on CPUs"


def test_it_is_waived_where_ranks_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    flags = ["--model", "tiny", "--refit-method", "cuda-ipc", "--ranks-per-gpu", "2"]
    with pytest.raises(UnavailableError, match=r"nccl_m2n needs a GPU per rank, .*NCCL refuses two ranks on one GPU"):
        NcclM2nEngine(parse(flags).scenario, torch.device("cuda")).check_available()


@pytest.mark.parametrize(("loaded", "found"), [((2, 28, 9), "2.28.9"), ((2, 30, 5), "2.30.5"), (None, "none")])
def test_it_is_waived_under_an_older_nccl(
    monkeypatch: pytest.MonkeyPatch, loaded: tuple[int, int, int] | None, found: str
) -> None:
    monkeypatch.setattr(nccl_m2n, "loaded_nccl_version", lambda: loaded)
    assert f"needs NCCL 2.30.7 or newer, {found} is loaded: preload it" in missing("cuda")


def test_it_is_waived_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_m2n, "loaded_nccl_version", lambda: (2, 31, 0))
    monkeypatch.setitem(sys.modules, "nccl.m2n", None)
    assert "pip install 'nccl-extensions[cu13]'" in missing("cuda")


def test_it_is_available_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_m2n, "loaded_nccl_version", lambda: (2, 30, 7))
    for name in ("nccl", "nccl.m2n"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    engine("cuda").check_available()


def test_the_version_is_that_of_the_loaded_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def ncclGetVersion(self, code: object) -> int:
            code._obj.value = 23007  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: {"libnccl.so.2": Library()}[name])
    assert environment.loaded_nccl_version() == (2, 30, 7)


@pytest.mark.parametrize(
    ("gin_type", "words"),
    [
        (0, "a call per tensor, because groups of calls need GIN"),
        (3, "calls in groups"),
        (None, "a call per tensor, because groups of calls need GIN, and NCCL cannot be asked for it (invalid usage)"),
    ],
    ids=["none", "some", "nccl4py newer than NCCL"],
)
def test_calls_are_grouped_only_where_gpus_reach_the_network(
    gin_type: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NCCLError(Exception): ...

    class Communicator:
        @property
        def properties(self) -> SimpleNamespace:
            if gin_type is None:
                raise NCCLError("invalid usage")
            return SimpleNamespace(gin_type=gin_type)

        @classmethod
        def init(cls, world_size: int, rank: int, unique_id: object) -> Communicator:
            return cls()

    ids = SimpleNamespace(from_bytes=bytes)
    core = SimpleNamespace(get_unique_id=lambda: b"id", UniqueId=ids, Communicator=Communicator, NCCLError=NCCLError)
    under_test = engine("cuda")
    monkeypatch.setattr(nccl_m2n.importlib, "import_module", lambda name: core)
    monkeypatch.setattr(NcclM2nEngine, "_check_everywhere", lambda self: None)
    monkeypatch.setattr(nccl_m2n, "_gathered", lambda mine: [mine, (True, "")])  # another rank has GIN
    monkeypatch.setattr(nccl_m2n.dist, "broadcast_object_list", lambda shared: None)
    connected = under_test.connect(cast(PlannedSides, None), Ranks(0, 4, HashStore(), ("host",) * 4))
    assert connected is not None
    assert connected.words == f"one communicator of 4 ranks, {words}"


def weights(*views: torch.Tensor, boxes: list[Box]) -> LocalWeights:
    return LocalWeights(LocalShard(FC1, box, view, view) for box, view in zip(boxes, views, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_end_gives_its_own_part_of_the_region(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate of expert 1, which ranks 0 and 1 hold a half of each: rows 0 to 3 of 8."""
    monkeypatch.setattr(nccl_m2n.dist, "get_rank", lambda: rank)
    gate, up = (torch.full((1, 2, 3), number, dtype=torch.bfloat16) for number in (1, 2))
    boxes = [Box((1, 2 * rank + 4 * part, 0), (1, 2, 3)) for part in (0, 1)]
    ends = nccl_m2n._Ends(weights(gate, up, boxes=boxes), None)
    region = Box((1, 0, 0), (1, 4, 3))
    call = nccl_m2n._Call(FC1, Reshard(region, Mesh(0, (1, 2), 1, 1), Mesh(2, (1, 1), 1, 0)))
    source, destination = ends.tensors(call)
    assert destination is None
    assert source is not None
    assert (source.data_ptr(), tuple(source.shape)) == (gate.data_ptr(), call.reshard.source.local_extents(region))
    assert ends.are_contiguous(call)


def test_a_part_with_gaps_in_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_m2n.dist, "get_rank", lambda: 0)
    wide, region = torch.zeros(1, 8, 6, dtype=torch.bfloat16), Box((1, 0, 0), (1, 8, 3))
    ends = nccl_m2n._Ends(weights(wide[:, :, :3], boxes=[region]), None)
    call = nccl_m2n._Call(FC1, Reshard(region, Mesh(0, (1, 1), 1, 0), Mesh(2, (1, 1), 1, 0)))
    assert not ends.are_contiguous(call)


def test_staging_buffers_grow_with_the_largest_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nccl_m2n.BUFFER_SIZES, "")  # restored after the test
    monkeypatch.delenv(nccl_m2n.BUFFER_SIZES)
    assert nccl_m2n._configure_buffers(5 << 20) == 2 << 30
    assert nccl_m2n.BUFFER_SIZES not in nccl_m2n.os.environ
    largest = 163840 * 7168 * 2
    assert largest <= nccl_m2n._configure_buffers(largest) <= LIMITS.max_local_bytes
    assert int(nccl_m2n.os.environ[nccl_m2n.BUFFER_SIZES].partition(":")[0]) >= largest
    monkeypatch.setenv(nccl_m2n.BUFFER_SIZES, "3221225472:2")
    nccl_m2n._configure_buffers(largest)
    assert nccl_m2n.os.environ[nccl_m2n.BUFFER_SIZES] == "3221225472:2"
