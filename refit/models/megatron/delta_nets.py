"""Gated delta nets of Megatron-Core in any layer spec, with and without flash-linear-attention, and their norms.

The layer is Megatron's own in both versions, 0.16.1 and 0.19.2. Its block specs put it beside attention only where all
layers are Transformer Engine's; here it takes the place of attention in the layers of any spec.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from refit.models.delta_net_kernels import has_kernels


def run_without_kernels() -> None:
    """Where flash-linear-attention is missing, both versions refuse to build the layer, though no weight depends on it.

    They have the gated delta rule in torch too, for deterministic runs. It takes the place of the kernel, and torch's
    own operations that of the two other kernels.
    """
    if has_kernels():
        return
    package: Any = importlib.import_module("megatron.core.ssm.gated_delta_net")
    rule = package.torch_chunk_gated_delta_rule
    modules = [package]
    if hasattr(package, "__path__"):  # 0.19.2, where it is a package
        modules += [importlib.import_module(f"{package.__name__}.{name}") for name in ("common", "gdn")]
    for module in modules:
        replaced = {"HAVE_FLA": True, "chunk_gated_delta_rule": rule, "l2norm": l2_norm}
        if len(modules) > 1:  # 0.16.1 has a convolution in torch
            replaced["causal_conv1d"] = causal_convolution
        vars(module).update(replaced)


def l2_norm(heads: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """As flash-linear-attention's `l2norm`."""
    return heads * torch.rsqrt((heads * heads).sum(dim=dim, keepdim=True) + eps)


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, **_: Any
) -> tuple[torch.Tensor, None]:
    """Of `x` `[batch, sequence, channels]` with `weight` `[channels, tokens]`, then SiLU: as the library's."""
    assert activation in ("silu", "swish"), activation
    padded = F.pad(x.transpose(1, 2), (weight.size(-1) - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.size(0))).transpose(1, 2), None


def in_place_of_attention(block_spec: Any, nets: Sequence[bool], config: Any, local: bool) -> Any:
    """`block_spec`, whose layers have attention, with a gated delta net in those of `nets`."""
    if not any(nets):
        return block_spec
    net, layers = _spec(config, local), []
    for layer, is_net in zip(block_spec.layer_specs, nets, strict=True):
        if is_net:  # layers may share one spec
            layer = dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, self_attention=net))
        layers.append(layer)
    return dataclasses.replace(block_spec, layer_specs=layers)


def _spec(config: Any, local: bool) -> Any:
    specs: Any = importlib.import_module("megatron.core.models.gpt.experimental_attention_variant_module_specs")
    if local:
        backend = importlib.import_module("megatron.core.models.backends").LocalSpecProvider()
    else:
        backend = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider").TESpecProvider()
    net = specs.get_gated_delta_net_module_spec(config, backend)
    if local:  # whose layers have a norm of their own before attention
        net.submodules.in_proj = backend.column_parallel_linear()
    net.submodules.out_norm = _plain(net.submodules.out_norm)
    return net


def _plain(norm: Any) -> type:
    """`norm` for a net's output: Qwen3-Next multiplies by the weights there, not by 1 + them as in its other norms.

    Megatron has one setting for all norms of a model.
    """

    class PlainNorm:
        def __new__(cls, config: Any, **options: Any) -> Any:
            config = copy.copy(config)
            config.layernorm_zero_centered_gamma = False
            return norm(config=config, **options)

    return PlainNorm


class NormAddingOne(torch.nn.RMSNorm):
    """An RMS norm that multiplies by 1 + its weights, as Transformer Engine's with `zero_centered_gamma`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = 1 + self.weight.float()
        return F.rms_norm(hidden.float(), self.normalized_shape, scale, self.eps).to(hidden.dtype)


@contextlib.contextmanager
def norms_add_one() -> Iterator[None]:
    """Build the norms of the local layer spec with `layernorm_zero_centered_gamma` too, which both versions refuse
    (torch_norm.py)."""
    norm: Any = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    original = norm.__new__

    def made(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> Any:
        if not config.layernorm_zero_centered_gamma:
            return original(cls, config, hidden_size, eps, **options)
        return NormAddingOne(hidden_size, eps=eps)

    norm.__new__ = made
    try:
        yield
    finally:
        norm.__new__ = original
