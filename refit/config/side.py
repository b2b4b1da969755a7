"""SideSpec: the specification of one side of a refit."""

from __future__ import annotations

from dataclasses import dataclass

from refit.config.layout import Layout, short_text
from refit.config.shape import Dtype


@dataclass(frozen=True, slots=True)
class SideSpec:
    """Which framework holds the weights, sharded how, on which ranks and in which dtype.

    `format` is a name of `FORMATS`; `layout` has the parallel sizes and the ranks. `dtype` is that of the parameters,
    None where a model provider chooses it. `transformer_impl` is Megatron's layer spec.
    """

    layout: Layout
    format: str = "megatron"
    dtype: Dtype | None = Dtype.BF16
    transformer_impl: str = "local"

    @property
    def ranks(self) -> range:
        return self.layout.ranks

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def title(self) -> str:
        """`TP2 EP2`; PP and ETP where they are not 1 and TP; the format where it is not Megatron's."""
        text = short_text(self.layout)
        return text if self.format == "megatron" else f"{self.format} {text}"
