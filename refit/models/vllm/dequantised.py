"""The parameters of an FP8 engine as a forward pass in plain torch uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from refit.config.quantisation import BlockFormat, Quantisation
from refit.models.float32 import in_float32
from refit.predict.vllm.quantised import SCALE_SUFFIXES


class Dequantised(Mapping[str, torch.Tensor]):
    """`parameters` by name: of FP8 ones codes x scales in BF16, computed when asked for.

    Each code is multiplied by the scale at its place in the parameter of scales, as vLLM's kernels do, whatever the
    logical tensors behind them are. So a wrong order of the scales within a fused parameter changes the result.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], quantisation: Quantisation) -> None:
        self._parameters, self._block = parameters, quantisation.format
        self._suffix = SCALE_SUFFIXES[quantisation.dtype]

    def __getitem__(self, name: str) -> torch.Tensor:
        scales = self._parameters.get(name + self._suffix)
        codes = self._parameters[name]
        return codes if scales is None else _product(codes, scales, self._block)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class InFloat32(Mapping[str, torch.Tensor]):
    """`parameters` by name, those of 16 bits in float32, computed when asked for."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        value: torch.Tensor = in_float32(self._parameters[name])
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _product(codes: torch.Tensor, scales: torch.Tensor, block: BlockFormat) -> torch.Tensor:
    """Of codes `[..., rows, columns]`."""
    rows = scales.float().repeat_interleave(block.rows, -2)[..., : codes.size(-2), :]
    return (codes.float() * rows.repeat_interleave(block.columns, -1)[..., : codes.size(-1)]).to(torch.bfloat16)
