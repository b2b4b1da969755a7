"""What each worker of a running vLLM does for refits: `worker_extension_cls` of the engine.

vLLM has two formats of every weight. A checkpoint fills the *load format*: the tensors that its layers create, which
`get_layerwise_info` remembers. A layer's `process_weights_after_loading` makes the *live format* of it: on CPUs linears
are packed by oneDNN and leave an empty parameter, experts are put in another order, an output layer keeps its weight
beside a packed copy. Here the load format has memory of its own, that the suite's ranks map and write, and `commit`
runs the layers' own post-processing again.

vLLM's own reload forgets the experts' packing and the packed copy of a tied output layer.
"""

from __future__ import annotations

import ctypes
import glob
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BIASES = ("e_score_correction_bias", "bias")
"""Biases of routers and of linears, which vLLM's reload leaves out of what it remembers."""

LIVE, COPIED, PACKED = "live", "copied", "packed"
"""How a weight is held: in the shared memory itself; by a copy with the same bits; in another order or packed."""

PR_SET_PDEATHSIG = 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20


def digest(tensor: torch.Tensor) -> int:
    """A number of 64 bits that any change of one element changes, equal on every device: the sum of all elements' bits,
    each multiplied by an odd number of its place."""
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        places = torch.arange(start, start + part.numel(), dtype=torch.int64, device=part.device)
        total += (part * ((places * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E019) | 1)).sum()
    return int(total)


def num_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """Elements with other bits."""
    bits = _BITS[one.element_size()]
    return int((one.detach().view(bits) != other.detach().view(bits)).sum())


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process get a signal when the one that started it ends. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


@dataclass
class Weight:
    """A parameter of the load format: `attribute` of `module`. `memory` is None until it is opened.

    `of` is the module's full name. `name` is that of the parameter, or of the first one that is the same tensor.
    """

    of: str
    attribute: str
    module: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_alias: bool = False
    memory: torch.Tensor | None = None
    held: str = PACKED

    @property
    def live(self) -> torch.Tensor | None:
        found: torch.Tensor | None = self.module._parameters.get(self.attribute)
        return found

    @property
    def is_plain(self) -> bool:
        """Whether the live tensor has the load format's shape and dtype."""
        return self.live is not None and (tuple(self.live.shape), self.live.dtype) == (self.shape, self.dtype)


@dataclass
class Captured:
    """What graphs on a GPU have captured of a layer: its tensors by attribute, and its kernel, which holds others."""

    tensors: dict[str, torch.Tensor]
    kernel: Any

    @classmethod
    def of(cls, module: Any) -> Captured:
        own = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        held = {**module._buffers, **module._parameters, **own}
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        return cls(tensors, getattr(getattr(module, "quant_method", None), "moe_kernel", None))

    def put_back(self, module: Any) -> None:
        """Have the layer hold what was made anew in the tensors that it had."""
        for name, tensor in self.tensors.items():
            made = getattr(module, name, None)
            if made is None or (made.shape, made.dtype) != (tensor.shape, tensor.dtype):
                continue
            if made.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(made)
            setattr(module, name, tensor)


class RefitWorker:
    """Methods for `collective_rpc`. Names must not be those of vLLM's worker."""

    refit_weights: list[Weight] | None = None
    refit_captured: dict[int, Captured] | None = None
    refit_receiver: Any = None

    def refit_layout(self) -> dict[str, Any]:
        """The load format of this worker's weights: full name -> shape and dtype, tied ones once."""
        if os.getpid() != int(os.environ["REFIT_ENGINE_PROCESS"]):
            end_with_parent()
        _remove_names()
        self.refit_weights = list(_weights(self.model_runner.get_model()))  # type: ignore[attr-defined]
        layout = {
            each.name: (each.shape, str(each.dtype).removeprefix("torch."))
            for each in self.refit_weights
            if not each.is_alias
        }
        return {"rank": self.rank, "pid": os.getpid(), "layout": layout}  # type: ignore[attr-defined]

    def refit_open(self, regions: dict[int, Any]) -> dict[str, Any]:
        """Map the memory of this worker's weights: `regions[rank]` is a path, a size and the offset of every name.

        Returns how each weight is held, which a commit of a pattern shows.
        """
        assert self.refit_weights is not None
        path, nbytes, offsets = regions[self.rank]  # type: ignore[attr-defined]
        whole = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        for each in self.refit_weights:
            size = _numel(each.shape) * each.dtype.itemsize
            each.memory = whole[offsets[each.name] :][:size].view(each.dtype).view(each.shape)
            if not each.is_alias:
                each.memory.uniform_(-0.1, 0.1, generator=generator)
            if not _is_processed(each.module) and each.is_plain:
                assert each.live is not None
                each.live.data = each.memory
                each.held = LIVE
        self.refit_commit()
        for each in self.refit_weights:
            if each.held != LIVE and each.is_plain and not num_different(each.live, each.memory):  # type: ignore[arg-type]
                each.held = COPIED
        return {"held": {each.name: each.held for each in self.refit_weights if not each.is_alias}}

    def refit_export(self) -> dict[str, Any]:
        """On a GPU: the memory of this worker's weights by CUDA IPC, what rebuilds each tensor in another process.

        It is that of the live tensors where the kernels use the load format, else a buffer that a commit reads. So is
        that of all weights of an engine that sleeps: the memory that it gives up and takes again cannot be exported.
        """
        from torch.multiprocessing.reductions import reduce_tensor

        assert self.refit_weights is not None
        modules = {id(each.module): each.module for each in self.refit_weights}
        self.refit_captured = {key: Captured.of(module) for key, module in modules.items()}
        kept: dict[int, bool] = {}
        sleeps = self.model_config.enable_sleep_mode  # type: ignore[attr-defined]
        for each in self.refit_weights:
            key = id(each.module)
            if key not in kept:
                kept[key] = each.is_plain and self._keeps_load_format(each.module)
            if kept[key] and each.is_plain and not sleeps:
                assert each.live is not None
                each.memory, each.held = each.live.data, LIVE
            else:
                each.memory = torch.empty(each.shape, dtype=each.dtype, device=self.device)  # type: ignore[attr-defined]
                each.held = COPIED if kept[key] and each.is_plain else PACKED
        torch.cuda.synchronize()
        owned = [each for each in self.refit_weights if not each.is_alias]
        handles = {each.name: reduce_tensor(each.memory)[1] for each in owned}  # type: ignore[no-untyped-call]
        return {"rank": self.rank, "held": {each.name: each.held for each in owned}, "handles": handles}  # type: ignore[attr-defined]

    def _keeps_load_format(self, module: Any) -> bool:
        """Whether a layer computes with its parameters as a checkpoint fills them.

        Of experts in 16 bits a pattern that is processed shows it; their processing keeps its memory, which graphs have
        captured. Other layers on GPUs that pack or reorder change a shape or a dtype.
        """
        from vllm.config import set_current_vllm_config

        if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is None:
            return True
        held = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        if any(tensor.element_size() != 2 for tensor in held.values()):
            return True
        before = {name: tensor.detach().clone() for name, tensor in held.items()}
        for tensor in held.values():
            tensor.data.uniform_(-0.1, 0.1)
        pattern = {name: tensor.detach().clone() for name, tensor in held.items()}
        with set_current_vllm_config(self.vllm_config), torch.no_grad():  # type: ignore[attr-defined]
            self.refit_process(module)
        kept = all(
            module._parameters[name].data_ptr() == tensor.data_ptr()
            and not num_different(module._parameters[name], pattern[name])
            for name, tensor in held.items()
        )
        assert self.refit_captured is not None
        self.refit_captured[id(module)].put_back(module)
        for name, values in before.items():
            module._parameters[name].data.copy_(values)
        return kept

    def refit_idle(self) -> None:
        """Return once this worker computes nothing any more."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def refit_commit(self) -> dict[str, float]:
        """Have the layers use what is in the memory. Returns the seconds by kind of layer."""
        from vllm.config import set_current_vllm_config

        assert self.refit_weights is not None
        seconds: dict[str, float] = {}
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        by_module: dict[int, list[Weight]] = {}
        for each in self.refit_weights:
            by_module.setdefault(id(each.module), []).append(each)
        with set_current_vllm_config(self.vllm_config), torch.no_grad():  # type: ignore[attr-defined]
            for key, weights in by_module.items():
                begin, module = time.perf_counter(), weights[0].module
                for each in weights:
                    _put(each)
                kind = "written live" if all(each.held == LIVE for each in weights) else self.refit_process(module)
                if kind != "written live" and self.refit_captured is not None:
                    self.refit_captured[key].put_back(module)
                seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - begin
            begin = time.perf_counter()
            for module in model.modules():  # MLA's absorbed weights come of linears that were just processed
                if _is_attention(module):
                    _process_attention(module, self.model_config.dtype)  # type: ignore[attr-defined]
            seconds["attention"] = time.perf_counter() - begin
        self.refit_idle()
        return seconds

    def refit_process(self, module: Any) -> str:
        """Run a layer's own post-processing. Returns its kind: `experts`, `linears` or `written live`."""
        if not _is_processed(module):
            return "written live"
        method = module.quant_method
        if hasattr(module, "_already_called_process_weights_after_loading"):
            del module._already_called_process_weights_after_loading
        method.process_weights_after_loading(module)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is None:
            return "linears"
        kernel.fused_experts.process_weights_after_loading(module)  # which vLLM does on the first call only
        return "experts"

    def refit_verify(self) -> dict[str, Any]:
        """The digest of every weight's memory as this process sees it, and of the live tensors that have the same bits
        where all is right: how many elements were compared, and how many are wrong by name."""
        assert self.refit_weights is not None
        wrong, num_compared = {}, 0
        for each in self.refit_weights:
            if each.held == PACKED:
                continue
            num_compared += _numel(each.shape)
            count = num_different(each.live, each.memory) if each.is_plain else _numel(each.shape)  # type: ignore[arg-type]
            if count:
                wrong[f"{each.of}.{each.attribute}"] = count
        digests = {each.name: digest(each.memory) for each in self.refit_weights if not each.is_alias}  # type: ignore[arg-type]
        return {"rank": self.rank, "digests": digests, "wrong": wrong, "num_compared": num_compared}  # type: ignore[attr-defined]

    def refit_receive(self, addresses: dict[str, str]) -> None:
        """checkpoint-engine's own update: its sender listens at `addresses`, by GPU."""
        from checkpoint_engine.worker import VllmColocateWorkerExtension
        from vllm.config import set_current_vllm_config

        if self.refit_receiver is None:  # its methods need no more of vLLM's worker
            self.refit_receiver = VllmColocateWorkerExtension()
            for name in ("device", "model_runner", "model_config"):
                setattr(self.refit_receiver, name, getattr(self, name))
        with set_current_vllm_config(self.vllm_config), torch.no_grad():  # type: ignore[attr-defined]
            self.refit_receiver.update_weights_from_ipc(addresses)

    def refit_reload(self, path: str) -> None:
        """vLLM's own reload, of the checkpoint in the folder `path`."""
        self.vllm_config.load_config.load_format = "safetensors"  # type: ignore[attr-defined]
        self.reload_weights(weights_path=path)  # type: ignore[attr-defined]

    def refit_read_back(self) -> None:
        """Copy what the live tensors hold into the memory, for weights that are not packed."""
        assert self.refit_weights is not None
        for each in self.refit_weights:
            if each.held != PACKED and not each.is_alias and each.is_plain:
                each.memory.copy_(each.live)  # type: ignore[union-attr, arg-type]


def _remove_names() -> None:
    """Remove the names of the memory with which workers on CPUs reduce: all have mapped it, and nobody else would.

    `_CPUSHMDistributed.make_group_name` (cpu_communicator.py) makes them.
    """
    identity = os.environ.get("VLLM_DIST_IDENT")  # of workers on CPUs
    for path in Path("/dev/shm").glob(f"{glob.escape(identity)}-*-cpushm*") if identity else ():
        path.unlink(missing_ok=True)


def _weights(model: Any) -> Iterator[Weight]:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    seen: dict[int, str] = {}
    for prefix, module in model.named_modules():
        if _is_attention(module):  # has scales of its cache until they have been processed, and no weights
            continue
        parameters, _ = get_layerwise_info(module).restore_metadata
        held = dict(parameters)
        held |= {name: module._parameters[name] for name in BIASES if module._parameters.get(name) is not None}
        for attribute, tensor in held.items():
            name, live = f"{prefix}.{attribute}", module._parameters.get(attribute)
            first = seen.setdefault(id(live), name) if live is not None and live.numel() else name
            yield Weight(prefix, attribute, module, first, tuple(tensor.shape), tensor.dtype, first != name)


def _is_processed(module: Any) -> bool:
    """Whether vLLM derives something from the module's weights."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)


def _is_attention(module: Any) -> bool:
    """Whether vLLM processes the module after all others."""
    from vllm.model_executor.layers import attention

    if hasattr(attention, "is_deferred_attention_layer"):
        return bool(attention.is_deferred_attention_layer(module))
    return isinstance(module, (attention.Attention, attention.MLAAttention))  # vLLM 0.25


def _process_attention(module: Any, dtype: torch.dtype) -> None:
    """Derive MLA's absorbed weights again, in the memory that they have: graphs have captured its address."""
    names = [name for name in ("W_UV", "W_UK_T") if isinstance(getattr(module, name, None), torch.Tensor)]
    before = {name: getattr(module, name) for name in names}
    module.process_weights_after_loading(dtype)
    for name, tensor in before.items():
        made = getattr(module, name)
        if made.data_ptr() != tensor.data_ptr() and tensor.is_cuda:
            tensor.copy_(made)
            setattr(module, name, tensor)


def _put(weight: Weight) -> None:
    """Make the live tensor that of the load format, for the post-processing that follows."""
    if weight.held == LIVE or weight.is_alias:
        return
    assert weight.memory is not None
    if weight.is_plain:
        weight.live.data.copy_(weight.memory)  # type: ignore[union-attr]
    else:
        # A copy, since packing may write where it has read.
        made = torch.nn.Parameter(weight.memory.clone(), requires_grad=False)
        weight.module.register_parameter(weight.attribute, made)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
