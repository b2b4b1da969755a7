"""Megatron-Core's own refit, `swap_model_weights`, as a program that the benchmark can run in place of ours.

On GPUs with Megatron's copy services, by name; on CPUs, where those do not run, with a CopyService of our own over
Gloo, which is the extension point Megatron offers. Nothing is added to what it does, and nothing of it is corrected.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding import refit as megatron_refit
from megatron.core.resharding.copy_services.base import CopyService

from refit.errors import RefitError
from refit.models.megatron import compat
from refit.models.megatron.build import BuiltModel
from refit.transport.base import RunReport


class GlooCopies(CopyService):  # type: ignore[misc]
    """Isend and irecv of every slice in one batch, local copies by task number. For both versions' ways of calling.

    Megatron's own Gloo service wants CUDA streams and pinned memory, on CPUs too.
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
        """What 0.16.1 calls."""
        self.submit_send(src_tensor, dest_rank, task_id)

    def submit_recv_with_id(self, task_id: int, dest_tensor: torch.Tensor, src_rank: int) -> None:
        """What 0.16.1 calls."""
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


class MegatronProgram:
    """`swap_model_weights` bound to two models, planned."""

    def __init__(self, source: Any, destination: Any, service: str | CopyService, device: torch.device) -> None:
        self._models = (source, destination)
        self._service = service
        self._device = device

    @property
    def staging_bytes(self) -> int:
        """Megatron does not bound or tell what it allocates: 0."""
        return 0

    def run(self) -> RunReport:
        """Collective: every rank of the default group. Raises RefitError with Megatron's message where it fails."""
        with compat.no_cuda_to_wait_for(self._device):
            try:
                megatron_refit.swap_model_weights(*self._models, self._service)
            except Exception as error:
                raise RefitError(_failed("swap_model_weights", error)) from error
        return RunReport()

    def close(self) -> None:
        """Give back Megatron's services and plans. Collective."""
        clear_caches(*self._models)


def prepare_megatron_refit(
    source: BuiltModel | None, destination: BuiltModel | None, method: str, *, device: torch.device | str
) -> MegatronProgram:
    """Clear Megatron's caches and let it plan, as its first `swap_model_weights` would.

    `method` is a refit method's name; on CPUs Megatron's runs over Gloo, whatever ours goes by. `device` is where the
    models are: idle ranks have none to tell.
    Collective: every rank of the default group must call, a side this rank is not part of being None. Raises
    UnavailableError where Megatron has no such method here, and RefitError with Megatron's own message, on every rank,
    where it cannot plan this refit.
    """
    device = torch.device(device)
    service = _service(method, device.type == "cuda")
    modules = [None if model is None else model.module for model in (source, destination)]
    if not compat.has_refit_of_absent_models():
        modules = _with_stand_ins(modules)
    clear_caches(*modules)
    _plan(*modules)
    return MegatronProgram(modules[0], modules[1], service, device)


def clear_caches(*modules: Any) -> None:
    """Forget Megatron's services and plans. 0.19.2 finds plans by parallel sizes, not by model; 0.16.1 keeps its plan
    on the destination, whatever the source."""
    if hasattr(megatron_refit, "clear_all_caches"):  # 0.19.2
        megatron_refit.clear_all_caches()
    else:
        megatron_refit.clear_service_cache()
    for module in modules:
        if hasattr(module, "_cached_reshard_plan"):  # 0.16.1
            del module._cached_reshard_plan


def _service(method: str, cuda: bool) -> str | CopyService:
    if not cuda:
        return GlooCopies()
    if method == "nvshmem":
        compat.check_nvshmem_kernel()
    return method


def _with_stand_ins(modules: list[torch.nn.Module | None]) -> list[torch.nn.Module | None]:
    """0.16.1: a stand-in for each absent model. Collective, since an idle rank does not know the number of experts."""
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
