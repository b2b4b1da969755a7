"""The baseline: Megatron-Core's own refit, `swap_model_weights`.

On GPUs it uses Megatron's copy services, chosen by name. They do not run on CPUs, so there it uses `GlooCopies`, our
implementation of Megatron's CopyService interface. Megatron's results are neither corrected nor changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding import refit as megatron_refit
from megatron.core.resharding.copy_services.base import CopyService

from refit.bench.sides import Side
from refit.config.registry import METHODS
from refit.config.scenario import Scenario
from refit.errors import RefitError, UnavailableError
from refit.models.megatron import compat
from refit.models.megatron.build import BuiltModel
from refit.models.megatron.side import MegatronSide
from refit.plan.plan import RefitPlan
from refit.predict.sides import PlannedSides
from refit.transport.base import RunReport
from refit.transport.ranks import Ranks, gpus_here
from refit.transport.two_sided.nccl_links import peers_of


class GlooCopies(CopyService):  # type: ignore[misc]
    """A CopyService over Gloo: one batch of isend and irecv, local copies matched by task number.

    It has the methods that 0.16.1 and 0.19.2 call. Megatron's own Gloo service needs CUDA streams and pinned memory,
    even on CPUs.
    """

    requires_process_group_barrier = False

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._operations: list[dist.P2POp] = []
        self._local_sources: dict[int | None, torch.Tensor] = {}
        self._local_destinations: dict[int | None, torch.Tensor] = {}

    def submit_send(self, src_tensor: torch.Tensor, dest_rank: int, task_id: int | None = None) -> None:
        if dest_rank == self.rank:
            self._local_sources[task_id] = src_tensor
        else:
            self._operations.append(dist.P2POp(dist.isend, src_tensor, dest_rank))

    def submit_recv(self, dest_tensor: torch.Tensor, src_rank: int, task_id: int | None = None) -> None:
        if src_rank == self.rank:
            self._local_destinations[task_id] = dest_tensor
        else:
            self._operations.append(dist.P2POp(dist.irecv, dest_tensor, src_rank))

    def submit_send_with_id(self, task_id: int, src_tensor: torch.Tensor, dest_rank: int) -> None:
        """Called by 0.16.1."""
        self.submit_send(src_tensor, dest_rank, task_id)

    def submit_recv_with_id(self, task_id: int, dest_tensor: torch.Tensor, src_rank: int) -> None:
        """Called by 0.16.1."""
        self.submit_recv(dest_tensor, src_rank, task_id)

    def run(self) -> None:
        requests = dist.batch_isend_irecv(self._operations) if self._operations else []
        with torch.no_grad():
            for task_id, destination in self._local_destinations.items():
                destination.copy_(self._local_sources[task_id])
        for request in requests:
            request.wait()
        self._operations = []
        self._local_sources.clear()
        self._local_destinations.clear()


class MegatronEngine:
    """The `RefitEngine` of `swap_model_weights`."""

    uses_plan = False

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self._is_shared = gpus_here(scenario.ranks_per_gpu).is_shared
        self.transport = service_name(scenario.method, device, is_shared=self._is_shared)
        self._method = scenario.method
        self._device = device

    def check_available(self) -> None:
        """Nothing to check: importing this module already needs Megatron's resharding package."""

    def connect(self, planned: PlannedSides, ranks: Ranks) -> None:
        """On GPUs, connect our plan's pairs of ranks over NCCL, as for our own refit. Collective: every rank.

        Megatron's refit knows the default group only, so `ranks` are those of it.
        """
        if self._device.type == "cuda" and not self._is_shared:
            _connect_default_group(planned.plan, ranks.rank, self._device)

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> MegatronProgram:
        assert not planned.wires, "its row of ENGINES does not encode"
        return prepare_megatron_refit(_built(source), _built(destination), self.transport, device=self._device)

    def not_moved(self) -> Mapping[str, str]:
        return {}

    def note(self) -> str | None:
        if self.transport == self._method:
            return None
        why = f"it has no {self._method}" if self._device.type == "cuda" else "on CPUs it has no other way"
        if self._is_shared and self._device.type == "cuda":
            why += ", and NCCL refuses two ranks on one GPU"
        return f"Megatron-Core's own refit runs over {self.transport} here: {why}"


def service_name(method: str, device: torch.device, *, is_shared: bool = False) -> str:
    """What moves Megatron's bytes where ours go by `method`: the same where it has it, on CPUs always Gloo.

    Where ranks share a GPU (`is_shared`) only Gloo can.
    """
    if device.type != "cuda" or is_shared:
        return "gloo"
    return METHODS[method].megatron_service


def _connect_default_group(plan: RefitPlan, rank: int, device: torch.device) -> None:
    """Send one byte between every pair of `plan`, because NCCL connects two ranks at their first message.

    Collective: every rank of the default group.
    """
    # The first operation of a group creates its communicator and needs all members at once.
    dist.all_reduce(torch.zeros(1, device=device))
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    targets, origins = peers_of(plan, rank)
    operations = [dist.P2POp(dist.irecv, torch.empty_like(byte), origin) for origin in origins]
    operations += [dist.P2POp(dist.isend, byte, target) for target in targets]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    torch.cuda.synchronize(device)


def _built(side: Side) -> BuiltModel | None:
    if not isinstance(side.model, MegatronSide):
        raise UnavailableError(f"Megatron-Core's own refit needs Megatron models, one side is {side.spec.format}")
    return side.model.built


class MegatronProgram:
    """`swap_model_weights` bound to two models, with its plan made."""

    def __init__(self, source: Any, destination: Any, service: str | CopyService, device: torch.device) -> None:
        self._models = (source, destination)
        self._service = service
        self._device = device

    @property
    def staging_bytes(self) -> int:
        """0: Megatron neither limits nor reports what it allocates."""
        return 0

    def run(self) -> RunReport:
        """Run one refit. Collective: every rank of the default group.

        Raises RefitError with Megatron's message where it fails.
        """
        with compat.no_cuda_to_wait_for(self._device):
            try:
                megatron_refit.swap_model_weights(*self._models, self._service)
            except Exception as error:
                raise RefitError(_failed("swap_model_weights", error)) from error
        return RunReport()

    def close(self) -> None:
        """Drop Megatron's cached services and plans. Collective: every rank of the default group."""
        clear_caches(*self._models)


def prepare_megatron_refit(
    source: BuiltModel | None, destination: BuiltModel | None, method: str, *, device: torch.device | str
) -> MegatronProgram:
    """Clear Megatron's caches and let Megatron plan, as its first `swap_model_weights` would.

    `source` and `destination` are None on ranks outside that side. `method` is a refit method's name; on CPUs the
    baseline always runs over Gloo. `device` is the models' device, since idle ranks hold no model.
    Collective: every rank of the default group. Raises UnavailableError where Megatron cannot run this method here,
    and RefitError with Megatron's message, on every rank, where it cannot plan this refit.
    """
    device = torch.device(device)
    service = _service(method, device)
    modules = [None if model is None else model.module for model in (source, destination)]
    if not compat.has_refit_of_absent_models():
        modules = _with_stand_ins(modules)
    clear_caches(*modules)
    _plan(*modules)
    return MegatronProgram(modules[0], modules[1], service, device)


def clear_caches(*modules: Any) -> None:
    """Clear Megatron's cached services and plans.

    0.19.2's cache keys hold parallel sizes and do not distinguish models. 0.16.1 keeps its plan on the destination,
    whatever the source.
    """
    if hasattr(megatron_refit, "clear_all_caches"):  # 0.19.2
        megatron_refit.clear_all_caches()
    else:
        megatron_refit.clear_service_cache()
    for module in modules:
        if hasattr(module, "_cached_reshard_plan"):  # 0.16.1
            del module._cached_reshard_plan


def _service(method: str, device: torch.device) -> str | CopyService:
    if device.type != "cuda":
        return GlooCopies()
    if method == "nvshmem":
        compat.check_nvshmem_kernel()
    return service_name(method, device)


def _with_stand_ins(modules: list[torch.nn.Module | None]) -> list[torch.nn.Module | None]:
    """For 0.16.1: an AbsentModel for each None. Collective: ranks exchange the number of experts."""
    mine = next((int(m.config.num_moe_experts or 0) for m in modules if m is not None), 0)  # type: ignore[union-attr,arg-type]
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, mine)
    return [compat.AbsentModel(max(counts) or None) if module is None else module for module in modules]


def _plan(source: Any, destination: Any) -> None:
    try:
        if compat.has_refit_of_absent_models():
            megatron_refit.prepare_swap_model_weights(source, destination)
        else:
            compat.plan_refit_of_0_16(source, destination, source.config.num_moe_experts)
    except Exception as error:
        raise RefitError(_failed("planning", error)) from error


def _failed(step: str, error: Exception) -> str:
    return f"Megatron-Core's own refit failed in {step}: {error}"
