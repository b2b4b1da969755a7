"""Builds a side that a running vLLM serves: its ranks map the memory of the engine's workers."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from refit.config.quantisation import CODES_DTYPE
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import ShardingError, UnavailableError, UsageError
from refit.memory.weights import LocalWeights
from refit.models.forward_pass import ForwardPass
from refit.models.sharded_model import WithoutSteps
from refit.models.vllm.engine.layout import Layout
from refit.models.vllm.engine.process import ON_DEVICE, WORKER, EngineError, EngineProcess, model_folder
from refit.models.vllm.engine.serving import GENERATED_TOKENS, PROMPT_TOKENS, Serving, facts_of
from refit.models.vllm.side import weights_of
from refit.predict.families.config_json import config_values
from refit.predict.families.tables import closest_family
from refit.predict.vllm.names import followed_name
from refit.predict.vllm.options import VllmOptions
from refit.predict.vllm.parameters import FUSED, Engines, RankBlock
from refit.predict.vllm.quantised import held_blocks
from refit.transport.one_sided.ipc_memory import open_region

POWERS_OF_TWO = "pow2"
"""The rule by which DeepGEMM scales."""

GPU_SHARE = 0.35
"""Of a GPU's memory for the engine's weights and cache: the trainer has the rest."""


class RunningSide(WithoutSteps):
    """The `ShardedModel` of a rank whose weights are those of a worker of `serving`."""

    def __init__(self, weights: LocalWeights | None, serving: Serving) -> None:
        self.weights, self.serving = weights, serving

    def check_forward(self) -> None:
        """Raises UnavailableError: an engine says what it generates, not what its layers compute."""
        raise UnavailableError("a running engine is compared by what it generates")

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        return ForwardPass()


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> RunningSide:
    """Start the engine on the side's first rank, and map its workers' memory on every rank of the side.

    Collective: every rank of the job. Raises UsageError with vLLM's reason where vLLM refuses the model, and
    ShardingError where the engine holds other parameters than predicted.
    """
    shape, python = scenario.model, side.running_engine
    assert shape is not None, "a model provider builds Megatron models only"
    assert python is not None
    rank, process = dist.get_rank(), None
    if rank == side.ranks[0]:
        with model_folder(json.dumps(config_of(shape, side))) as folder:
            settings = settings_of(shape, side, folder, device.type)
            process = EngineProcess(Path(python), settings, ON_DEVICE[device.type])
    described = _from_first(side, process.facts if process is not None else None)
    if described["tp"] != side.layout.tp:
        raise EngineError(f"the vLLM engine runs with TP {described['tp']}, the {name} has TP {side.layout.tp}")
    _check_scales(side, described, name)
    prompt = prompt_of(shape)
    worker = rank - side.ranks[0] if rank in side.ranks else None
    blocks: tuple[RankBlock, ...] = ()
    layout = Layout({})
    if worker is not None:
        engines = Engines(shape, side)
        blocks = tuple(held_blocks(engines, engines.engine.place(worker)))
        layout = Layout.stated(next(each for each in described["workers"] if each["rank"] == worker))
        if differences := layout.differences(blocks):
            raise ShardingError(
                f"worker {worker} of vLLM {described['version']} holds other than predicted in {len(differences)} "
                f"parameters (predicted != vLLM's): {'; '.join(differences)}"
            )
    share = opened if device.type == "cpu" else exported
    answers, held = share(side, process, worker, layout)
    serving = Serving(
        process, facts_of(described, answers), prompt, worker, held, side.options_as(VllmOptions).engine_sleep
    )
    if worker is None:
        return RunningSide(None, serving)
    weights = weights_of(engines, blocks, {followed_name(name): tensor for name, tensor in held.items()})
    return RunningSide(weights, serving)


Shared = tuple[Sequence[Mapping[str, Any]], dict[str, torch.Tensor]]
"""What each worker said of its weights, and those of this rank's worker by the engine's names."""


def opened(side: SideSpec, process: EngineProcess | None, worker: int | None, layout: Layout) -> Shared:
    """Give the engine memory that it maps, on CPUs. Collective: every rank of the job."""
    if worker is None:
        _gathered(None)
        return _from_first(side, None), {}
    descriptor = _new_memory(layout.nbytes)
    try:
        region = (f"/proc/{os.getpid()}/fd/{descriptor}", layout.nbytes, layout.offsets)
        regions = dict(each for each in _gathered((worker, region)) if each is not None)
        answers = _from_first(side, process.ask("open", regions=regions) if process is not None else None)
        whole = torch.frombuffer(mmap.mmap(descriptor, layout.nbytes), dtype=torch.uint8)
    finally:
        os.close(descriptor)
    return answers, {name: _tensor(layout, name, whole) for name in layout.held}


def exported(side: SideSpec, process: EngineProcess | None, worker: int | None, layout: Layout) -> Shared:
    """Map memory that the engine exports, on a GPU. Collective: every rank of the job."""
    answers = _from_first(side, process.ask("export") if process is not None else None)
    mine: Mapping[str, Any] = next((each["handles"] for each in answers if each["rank"] == worker), {})
    return answers, {name: open_region((rebuild_cuda_tensor, arguments)) for name, arguments in mine.items()}


def config_of(shape: ModelShape, side: SideSpec) -> dict[str, Any]:
    """The config.json that the engine gets."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    values = config_values(shape)
    family = closest_family(shape)
    extra: dict[str, Any] = {"architectures": [family.architecture], "torch_dtype": side.dtype.value}
    extra |= family.engine_values(shape)
    if shape.mla is not None and shape.experts is not None and shape.experts.expert_bias:
        extra |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if side.quantisation is not None:
        extra["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [side.quantisation.format.rows, side.quantisation.format.columns],
            "modules_to_not_convert": kept_modules(shape, side),
        }
    return {**values, **extra, "bos_token_id": 1, "eos_token_id": 2}


def kept_modules(shape: ModelShape, side: SideSpec) -> list[str]:
    """The modules with matrices that stay in 16 bits, by the names of a checkpoint; of fused ones those of their parts.

    vLLM quantises all linears but these, routers too.
    """
    engines, found = Engines(shape, side), list[str]()
    for block in held_blocks(engines, engines.engine.place(0)):
        for one in block.parameters:
            if len(one.shape) > 1 and one.dtype not in (CODES_DTYPE, "float32"):
                names = FUSED.get(one.name, (one.name,))
                found += [f"{block.block.prefix}{name}".removesuffix(".weight") for name in names]
    return found


def settings_of(shape: ModelShape, side: SideSpec, folder: Path, device: str) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM` on a `device` of this type."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    settings: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": side.dtype.value,
        "max_model_len": min(shape.max_position_embeddings, 512),
        "max_num_seqs": 8,
        "tensor_parallel_size": side.layout.tp,
        "enable_prefix_caching": True,
        "worker_extension_cls": WORKER,
        "disable_log_stats": True,
        "enable_sleep_mode": side.options_as(VllmOptions).engine_sleep > 0,
    }
    if device == "cuda":
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
        settings |= {"gpu_memory_utilization": GPU_SHARE, "weight_transfer_config": {"backend": "ipc"}}
        return {**settings, "compilation_config": graphs}
    settings |= {"block_size": 16 if shape.mla is not None else 32, "enforce_eager": True}
    if shape.mla is not None:  # with plain rope, vLLM's kernel for CPUs takes the wrong stride of a query of 3 dims
        settings["compilation_config"] = {"custom_ops": ["none"]}
    return settings


def _check_scales(side: SideSpec, described: Mapping[str, Any], name: str) -> None:
    """Raise UsageError where the engine has other scales than a refit makes, and so other codes."""
    if side.quantisation is None or not described["rounds_scales"] or side.quantisation.rule == POWERS_OF_TWO:
        return
    raise UsageError(
        f"{name}: vLLM {described['version']} quantises block FP8 again when it loads, to scales that are powers of "
        f"two (DeepGEMM), the refit's follow the rule {side.quantisation.rule}: give --fp8-scale-rule {POWERS_OF_TWO}, "
        "or set VLLM_USE_DEEP_GEMM_E8M0=0"
    )


def prompt_of(shape: ModelShape) -> list[int]:
    """Tokens that are the same in every run."""
    num_tokens = min(PROMPT_TOKENS, shape.max_position_embeddings - GENERATED_TOKENS)
    drawn: list[int] = torch.randint(
        shape.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return drawn


def _new_memory(nbytes: int) -> int:
    """The descriptor of shared memory without a name, so that nothing is left of it whichever process dies."""
    descriptor = os.memfd_create("refit-vllm")
    os.posix_fallocate(descriptor, 0, nbytes)
    return descriptor


def _tensor(layout: Layout, name: str, whole: torch.Tensor) -> torch.Tensor:
    held = layout.held[name]
    dtype: torch.dtype = getattr(torch, held.dtype)
    size = torch.Size(held.shape).numel() * dtype.itemsize
    return whole[layout.offsets[name] :][:size].view(dtype).view(held.shape)


def _from_first(side: SideSpec, mine: Any) -> Any:
    """What the side's first rank gives, on every rank of the job. Collective: every one of them."""
    said = [mine]
    dist.broadcast_object_list(said, src=side.ranks[0], device=torch.device("cpu"))
    return said[0]


def _gathered(mine: Any) -> list[Any]:
    """Collective: every rank of the job."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
