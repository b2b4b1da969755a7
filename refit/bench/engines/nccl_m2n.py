"""A baseline: NVIDIA's nccl_m2n (package nccl-extensions), which reshards tensors between two meshes of ranks.

It moves every tensor that two meshes describe (`refit.plan.meshes`), a call each, over a communicator of all ranks of
the job. The rest is left as it is and reported. Its settings are those of the library, except for staging buffers that
are too small for a tensor of the model.

Calls in a group are packed together by a kernel whose device communicator needs GIN, NCCL's networking from the GPU.
Where no network adapter supports GIN, that communicator cannot be made. Single calls go through copy engines there.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from refit.bench.environment import loaded_nccl_version
from refit.bench.sides import Side
from refit.config.scenario import Scenario
from refit.errors import RefitError, UnavailableError
from refit.memory.streams import new_stream, wait_for_events
from refit.memory.weights import LocalWeights, generations
from refit.plan.meshes import Mesh, MeshLimits, Reshard, mesh_refit
from refit.plan.sharding import TensorSpec
from refit.predict.sides import PlannedSides
from refit.transport.base import Connected, RunReport
from refit.transport.ranks import Ranks, check_own_gpus

MIN_NCCL = (2, 30, 7)
"""The NCCL that the package nccl-extensions 0.1.0 is built for and requires."""

BUFFER_SIZES = "NCCL_RESHARD_PACK_BUFFSIZES"
DEFAULT_BUFFER_BYTES = 2 << 30
"""The library's staging buffer. A call needs one as large as its largest part on a rank (docs of the PACK copies)."""

GRAIN_BYTES = 2 << 20

LIMITS = MeshLimits(
    # Of nccl_m2n.h: the dtypes, and NCCL_RESHARD_MAX_TENSOR_DIMS.
    dtypes=frozenset({"int8", "uint8", "float16", "bfloat16", "int32", "float32", "int64", "float64"}),
    max_dims=3,
    # MAX_SOURCES and MAX_TARGETS of reshard_limits.h.
    max_fan_in=16,
    max_fan_out=64,
    # With a staging buffer of 4 GiB a call never returns (NVIDIA/nccl-extensions issue 15).
    max_local_bytes=(4 << 30) - GRAIN_BYTES,
)

MAX_GROUP = 4096
"""The most calls that the library packs as one group (kM2nGroupMaxFusionEntries)."""


class NcclM2nEngine:
    """The `RefitEngine` of nccl_m2n."""

    uses_plan = False
    transport = "nccl"

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._timeout_s = scenario.timeout_s
        self._ranks_per_gpu = scenario.ranks_per_gpu
        self._device = device
        self._communicator: Any = None
        self._has_gin = False
        self._not_moved: dict[str, str] = {}

    def check_available(self) -> None:
        """Raise UnavailableError without GPUs, the package, or an NCCL that is new enough."""
        if self._device.type != "cuda":
            raise UnavailableError("nccl_m2n moves memory of GPUs only, the models are on CPUs")
        check_own_gpus("nccl_m2n", self._ranks_per_gpu, "NCCL refuses two ranks on one GPU as invalid usage")
        loaded = loaded_nccl_version()
        if loaded is None or loaded < MIN_NCCL:
            needed, found = (".".join(map(str, version)) for version in (MIN_NCCL, loaded or ("none",)))
            raise UnavailableError(
                f"nccl_m2n needs NCCL {needed} or newer, {found} is loaded: preload it with LD_PRELOAD=.../libnccl.so.2"
            )
        try:
            _library()
        except (ImportError, OSError, RuntimeError) as error:
            raise UnavailableError(
                f"nccl_m2n cannot be loaded ({error}): pip install 'nccl-extensions[cu13]'"
            ) from error

    def connect(self, planned: PlannedSides, ranks: Ranks) -> Connected | None:
        """Create a communicator of all ranks of the job, which are those of the default group.

        Collective: every rank of the job.
        """
        self._check_everywhere()
        core = importlib.import_module("nccl.core")
        rank, world_size = ranks.rank, ranks.size
        shared = [bytes(core.get_unique_id()) if rank == 0 else None]
        dist.broadcast_object_list(shared)
        try:
            self._communicator = core.Communicator.init(world_size, rank, core.UniqueId.from_bytes(shared[0]))
        except Exception as error:
            raise RefitError(f"nccl_m2n: no communicator could be made: {error}") from error
        answers = _gathered(_gin(self._communicator))
        # All ranks make the same calls, so one without GIN decides for all.
        self._has_gin, why_not = min(answers)
        calls = "calls in groups" if self._has_gin else f"a call per tensor, because groups of calls need GIN{why_not}"
        return Connected(f"one communicator of {world_size} ranks, {calls}")

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> M2nProgram:
        """Describe every tensor that meshes can describe. Collective: every rank of the job.

        Raises UnavailableError where there is none.
        """
        found = mesh_refit(source.sharding, destination.sharding, LIMITS)
        calls = [
            _Call(destination.sharding.tensors[key], each) for key, all_ in found.reshards.items() for each in all_
        ]
        ends = _Ends(source.weights, destination.weights)
        apart = _gathered({call.tensor.key for call in calls if not ends.are_contiguous(call)})
        scattered = {key: "it is not contiguous in a rank's memory" for keys in apart for key in sorted(keys)}
        self._not_moved = {**found.not_expressible, **scattered}
        calls = [call for call in calls if call.tensor.key not in scattered]
        if not calls:
            raise UnavailableError(f"nccl_m2n can move no tensor of this refit: {next(iter(self._not_moved.values()))}")
        return M2nProgram(self._communicator, calls, ends, self._timeout_s, self._device, grouped=self._has_gin)

    def not_moved(self) -> Mapping[str, str]:
        return self._not_moved

    def note(self) -> str | None:
        return None

    def _check_everywhere(self) -> None:
        """Raise UnavailableError on all ranks where one has something missing: the rest is collective."""
        reason: str | None = None
        try:
            self.check_available()
        except UnavailableError as error:
            reason = str(error)
        missing = next((each for each in _gathered(reason) if each is not None), None)
        if missing is not None:
            raise UnavailableError(missing)


def _gin(communicator: Any) -> tuple[bool, str]:
    """Whether NCCL reports GIN, and what the log adds where it cannot be asked.

    The question needs an NCCL as new as the one that nccl4py was built for; nccl-extensions installs an older one.
    """
    bindings = importlib.import_module("nccl.bindings.nccl")
    try:
        return bool(communicator.properties.gin_type), ""  # NcclGinType.NONE is 0
    except bindings.NCCLError as error:
        return False, f", and NCCL cannot be asked for it ({error})"


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the library: a region of one tensor."""

    tensor: TensorSpec
    reshard: Reshard


class _Ends:
    """Both ends of calls in this rank's memory."""

    def __init__(self, source: LocalWeights | None, destination: LocalWeights | None) -> None:
        self._weights = (source, destination)

    def current(self) -> tuple[int, ...]:
        """A value that changes where any weights have moved."""
        return generations(*self._weights)

    def are_contiguous(self, call: _Call) -> bool:
        """Whether this rank's parts of the call's region, if any, are single contiguous tensors."""
        return all(len(views) == 1 and views[0].is_contiguous() for views in self._views(call) if views)

    def tensors(self, call: _Call) -> list[torch.Tensor | None]:
        """This rank's part at the source and at the destination; None where it has none."""
        return [views[0] if views else None for views in self._views(call)]

    def _views(self, call: _Call) -> list[list[torch.Tensor]]:
        rank, region = dist.get_rank(), call.reshard.region
        found: list[list[torch.Tensor]] = []
        for weights, mesh in zip(self._weights, (call.reshard.source, call.reshard.destination), strict=True):
            if weights is None or rank not in mesh.ranks:
                found.append([])
                continue
            found.append([view.data for view in weights.views(call.tensor.key, mesh.box_of(rank, region))])
        return found


class M2nProgram:
    """All calls of a refit, bound to this rank's weights."""

    def __init__(
        self,
        communicator: Any,
        calls: list[_Call],
        ends: _Ends,
        timeout_s: float,
        device: torch.device,
        *,
        grouped: bool,
    ) -> None:
        self._communicator = communicator
        self._group_size = MAX_GROUP if grouped else 1
        self._calls = calls
        self._ends = ends
        self._timeout_s = timeout_s
        self._stream = new_stream(device)
        self.staging_bytes = _configure_buffers(max(call.reshard.local_bytes(call.tensor.itemsize) for call in calls))
        self._library = _library()
        self._handle = self._library.init()
        self._bound_at = ends.current()
        self._bound = self._bind()

    def run(self) -> RunReport:
        """Run one refit. Collective: every rank of the job.

        Raises RefitError with the library's message where it fails, and where time runs out.
        """
        starts = [time.perf_counter()]
        if (current := self._ends.current()) != self._bound_at:
            self._bound, self._bound_at = self._bind(), current
        starts.append(time.perf_counter())
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            for begin in range(0, len(self._bound), self._group_size):
                with self._library.group():
                    for source, destination in self._bound[begin : begin + self._group_size]:
                        self._handle.reshard(self._communicator, source, destination, stream=self._stream)
        except Exception as error:
            raise RefitError(f"nccl_m2n failed: {error}") from error
        starts.append(time.perf_counter())
        if wait_for_events([self._stream.record_event()], self._timeout_s):
            raise RefitError(f"nccl_m2n: rank {dist.get_rank()} is not done after {self._timeout_s:g} s (--timeout)")
        starts.append(time.perf_counter())
        phases = ("bind", "enqueue", "wait")
        return RunReport({name: end - start for name, start, end in zip(phases, starts, starts[1:], strict=False)})

    def close(self) -> None:
        """Release the library's buffers and the communicator. Collective: every rank of the job."""
        self._handle.destroy()
        self._communicator.destroy()

    def _bind(self) -> list[tuple[Any, Any]]:
        """Each call's source and destination as the library's DistTensor. Ranks without a part give no buffer."""
        bound = []
        for call in self._calls:
            meshes = (call.reshard.source, call.reshard.destination)
            pairs = zip(self._ends.tensors(call), meshes, strict=True)
            source, destination = (self._dist_tensor(call, buffer, mesh) for buffer, mesh in pairs)
            bound.append((source, destination))
        return bound

    def _dist_tensor(self, call: _Call, buffer: torch.Tensor | None, mesh: Mesh) -> Any:
        placements = [self._library.Replicate(), self._library.Replicate()]
        placements[mesh.shard_axis] = self._library.Shard(mesh.dim)
        tensor = self._library.DistTensor(
            buffer,
            local_shape=mesh.local_extents(call.reshard.region),
            dtype=call.tensor.dtype,
            mesh=self._library.Mesh(mesh.dims, start_rank=mesh.first_rank),
            placements=placements,
        )
        # Converted once: a call would convert it again each time, which takes 50 us of the 52 that a call takes.
        converted = tensor.as_binding()
        tensor.as_binding = lambda: converted
        return tensor


def _library() -> Any:
    return importlib.import_module("nccl.m2n")


def _configure_buffers(largest_bytes: int) -> int:
    """Give the library a staging buffer of at least `largest_bytes`; returns the bytes of one.

    It reads its settings when the first handle is made. A setting of the user's stays.
    """
    needed = -(-largest_bytes // GRAIN_BYTES) * GRAIN_BYTES
    if needed > DEFAULT_BUFFER_BYTES:
        os.environ.setdefault(BUFFER_SIZES, f"{needed}:4")
    return max(needed, DEFAULT_BUFFER_BYTES)


def _gathered(mine: Any) -> list[Any]:
    """The value of every rank. Collective: every rank of the job."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values
