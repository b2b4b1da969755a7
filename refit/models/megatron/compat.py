"""Workarounds for Megatron-Core versions and for running without a GPU, each with the version and the reason.

The versions are 0.16.1 and 0.19.2. Megatron is imported inside the functions, since `ready_megatron` must run first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refit.config.shape import ModelShape
from refit.errors import UnavailableError
from refit.models.megatron import delta_nets
from refit.models.megatron.groups import in_parallel_state


def ready_megatron() -> None:
    """Import the parts of Megatron-Core used here, without its warnings about optional libraries.

    0.19.2 imports triton for a CUDA graph kernel (moe/paged_stash.py) without declaring the dependency. Where triton is
    missing, that kernel module is replaced by a stub; nothing here calls it. Raises UnavailableError without Megatron.
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise UnavailableError("megatron-core is not installed: pip install 'megatron-core>=0.16.1'")
    if importlib.util.find_spec("triton") is None:
        kernels = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        vars(kernels).update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
        sys.modules.setdefault(kernels.__name__, kernels)
    with quiet(), compiled_when_called():
        for name in ("models.gpt.gpt_layer_specs", "models.gpt.gpt_model", "resharding.refit"):
            importlib.import_module(f"megatron.core.{name}")
    _name_missing_transformer_engine()
    delta_nets.run_without_kernels()


def megatron_version() -> tuple[int, ...]:
    """`(0, 16, 1)`, read from the module: a source checkout may have no package metadata."""
    text = str(importlib.import_module("megatron.core").__version__)
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())


def has_refit_of_absent_models() -> bool:
    """Whether `swap_model_weights` takes None for a model that is not on this rank: 0.19.2 does, 0.16.1 does not."""
    return hasattr(importlib.import_module("megatron.core.resharding.refit"), "prepare_swap_model_weights")


def check_latent_query_norm(shape: ModelShape) -> None:
    """Raise UnavailableError for latent attention with q/k norm but no q_lora_rank, which only 0.16.1 builds.

    0.16.1 normalises keys and values only. 0.19.2 (mla_qk_norm_config.py) refuses that, and with Transformer Engine it
    adds a query norm, which is another model.
    """
    if shape.mla is None or shape.mla.q_lora_rank is not None or not shape.qk_layernorm:
        return
    if importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config") is not None:
        raise UnavailableError(
            f"Megatron-Core {'.'.join(map(str, megatron_version()))} cannot build latent attention with "
            "--qk-layernorm and without --q-lora-rank: give a rank, leave the norm out, or install megatron-core 0.16.1"
        )


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _name_missing_transformer_engine() -> None:
    """For 0.16.1 without Transformer Engine: define a missing name, correct the flag HAVE_TE. 0.19.2 needs neither."""
    if has_transformer_engine():
        return
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):  # router_gating_linear raises NameError
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    attention.HAVE_TE = False  # type: ignore[attr-defined]  # isinstance() against a mock raises TypeError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's warnings (missing optional libraries, training advice, deprecations) out of the user's log."""
    logger = logging.getLogger("megatron")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Functions that are given to `torch.compile` within this context are compiled when they are first called.

    Megatron-Core decorates its fused functions so when it is imported. For the first of them torch imports its
    compiler, which took a third of the time of all imports (torch 2.13, Python 3.11), and a refit calls none of them.
    """
    compile_now: Any = torch.compile

    def compile_late(model: Any = None, **options: Any) -> Any:
        if not isinstance(model, types.FunctionType):
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_late
    try:
        yield
    finally:
        torch.compile = compile_now


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Run Megatron code on `device`.

    Both versions allocate on `torch.cuda.current_device()` and copy tied embeddings with `.cuda()`, whatever the
    device. On CPUs this context replaces both, so that they use the CPU.
    """
    if device.type == "cuda":
        yield
        return
    originals = torch.cuda.current_device, torch.Tensor.cuda
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor.to(device)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.cuda.current_device, torch.Tensor.cuda = originals  # type: ignore[method-assign]


@contextlib.contextmanager
def running_on(groups: Any, device: torch.device, num_chunks: int = 1) -> Iterator[None]:
    """Build, state or run a model of `num_chunks` chunks per rank on `device`, without Megatron's warnings.

    Both versions ask parallel_state for groups where they pass none on: in linear_q_proj and the gathers of latent
    attention, for the replica number of a tied output layer, for the chunk that has the multi-token prediction layers,
    and in 0.16.1 for all groups of those layers. So parallel_state holds `groups` for that time.
    """
    with in_parallel_state(groups, num_chunks), on_device(device), quiet():
        yield


@contextlib.contextmanager
def without_token_prediction(module: Any) -> Iterator[None]:
    """Run `module` forward without its multi-token prediction layers, for the logits of the next token alone.

    Without labels, 0.16.1 fails behind these layers, and 0.19.2 computes their loss on labels of its own. The last
    chunk expects their output from whichever chunk has them.
    """
    if not hasattr(module, "mtp_process"):
        yield
        return
    originals = module.mtp_process, module.config.mtp_num_layers
    module.mtp_process, module.config.mtp_num_layers = False, None
    try:
        yield
    finally:
        module.mtp_process, module.config.mtp_num_layers = originals


def known_fields(config_class: type, values: Mapping[str, object]) -> dict[str, object]:
    """The `values` whose fields this version's config class has. The versions differ in their fields."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in names}


def replace_parts(layer_spec: Any, core_attention: type, experts: type | None) -> None:
    """Change a local layer spec in place, so that it can be built and run with or without a GPU.

    - Core attention, both versions: DotProductAttention does not support latent attention and needs CUDA's random
      state.
    - Grouped experts, both versions: those of the local spec do not run on CPUs.
    """
    layer_spec.submodules.self_attention.submodules.core_attention = core_attention
    if experts is None or not is_routed(layer_spec):
        return
    mlp = layer_spec.submodules.mlp
    if isinstance(mlp, functools.partial):  # 0.19.2
        # Layers share this object, and all of them get the same experts.
        mlp.keywords["submodules"].experts = experts
    else:  # 0.16.1
        from megatron.core.transformer.spec_utils import ModuleSpec

        mlp.submodules.experts = ModuleSpec(module=experts)


@contextlib.contextmanager
def latent_projections(linear: type) -> Iterator[None]:
    """Build the projections around latent experts as `linear`: both versions build them as Transformer Engine's linear
    only, in any layer spec (moe_layer.py)."""
    moe_layer: Any = importlib.import_module("megatron.core.transformer.moe.moe_layer")
    # Without Transformer Engine, 0.16.1 leaves TELinear undefined.
    originals = moe_layer.HAVE_TE, getattr(moe_layer, "TELinear", None)
    moe_layer.HAVE_TE, moe_layer.TELinear = True, linear
    try:
        yield
    finally:
        moe_layer.HAVE_TE, moe_layer.TELinear = originals


def is_routed(layer_spec: Any) -> bool:
    """Whether a layer's MLP is a mixture of experts; 0.16.1 has a ModuleSpec there, 0.19.2 a functools.partial."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mlp = layer_spec.submodules.mlp
    return (mlp.func if isinstance(mlp, functools.partial) else mlp.module) is MoELayer


def mark_grouped_weight(weight: torch.Tensor, config: Any, row_parallel: bool) -> None:
    """Set the attributes that Transformer Engine and this version of Megatron leave on a grouped expert's weight.

    The attributes are wrong for resharding. They are reproduced on purpose, since Megatron's own refit reads them.
    Nothing else in this project does. TE (2.20) sets partition_dim 0 for fc2 too where Megatron hides its parallel mode
    (`explicit_expert_comm`), and 0.16.1 leaves that. 0.19.2 (extensions/transformer_engine.py,
    `_set_expert_parameter_attributes`) corrects the dim, but sets the stride of a gated fc1 to 1.
    """
    tp, etp, ep = (
        config.tensor_model_parallel_size,
        config.expert_tensor_parallel_size,
        config.expert_model_parallel_size,
    )
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    if hasattr(extension, "_set_expert_parameter_attributes"):
        allreduce, dim = not (ep > 1 or etp != tp), 1 if row_parallel else 0
    else:
        hidden = etp > 1 or ep > 1
        allreduce, dim = not ep > 1, 1 if row_parallel and not hidden else 0
    vars(weight).update(allreduce=allreduce, tensor_model_parallel=True, partition_dim=dim, partition_stride=1)


@dataclasses.dataclass(frozen=True)
class FailedPlan:
    """Sent in place of 0.16.1's plans when planning failed on rank 0. Reading it raises rank 0's error."""

    reason: str

    @property
    def recv_ops(self) -> Any:
        raise RuntimeError(self.reason)


def plan_refit_of_0_16(source: torch.nn.Module, destination: torch.nn.Module, num_experts: int | None) -> None:
    """Plan as `swap_model_weights` of 0.16.1 does on its first call, and store the plan where it looks for it.

    0.16.1 plans on rank 0 and broadcasts the plans. An error on rank 0 would leave every other rank waiting for ever.
    So rank 0 sends the reason in place of the plans, and all ranks raise. Collective: every rank of the default group.
    """
    from megatron.core.resharding import build_centralized_reshard_plan

    try:
        plan = build_centralized_reshard_plan(source, destination, num_experts=num_experts)
    except Exception as error:
        if dist.get_rank() == 0:
            dist.broadcast_object_list([FailedPlan(str(error))] * dist.get_world_size(), src=0)
        raise
    destination._cached_reshard_plan = plan


class AbsentModel(torch.nn.Module):
    """For 0.16.1, which takes no None: a model that is not on this rank, without parameters and groups."""

    def __init__(self, num_experts: int | None) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(num_moe_experts=num_experts)
        self.pg_collection = types.SimpleNamespace(dp=())


@contextlib.contextmanager
def no_cuda_to_wait_for(device: torch.device) -> Iterator[None]:
    """Replace `torch.cuda.synchronize()` on CPUs: 0.19.2 calls it in `execute_reshard_plan`, where it would fail."""
    if device.type == "cuda":
        yield
        return
    original = torch.cuda.synchronize
    torch.cuda.synchronize = lambda *_, **__: None
    try:
        yield
    finally:
        torch.cuda.synchronize = original


def check_nvshmem_kernel() -> None:
    """Raise UnavailableError where the kernel of Megatron's NVSHMEM refit is missing, as in wheels up to 0.19.2."""
    package = importlib.util.find_spec("megatron.core.resharding.nvshmem_copy_service")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    kernels = [Path(folder) / "kernels" / "chunked_kernel.cu" for folder in folders]
    if not any(kernel.is_file() for kernel in kernels):
        raise UnavailableError(
            f"Megatron-Core's NVSHMEM refit has no kernel here ({kernels[0] if kernels else 'no such package'}): its "
            "wheels leave the file out; copy it from Megatron-LM's repository, or use --refit-method nccl"
        )
