"""SideSpec: the specification of one side of a refit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from refit.config.layout import Layout, short_text
from refit.config.options import SideOptions, options_as
from refit.config.quantisation import Quantisation
from refit.config.registry import DEFAULT_FORMAT
from refit.config.shape import Dtype

T = TypeVar("T")

ATTN_IMPLS = ("sdpa", "eager", "flash_attention_2")
"""Implementations of attention that transformers has for its models: torch's, written out, and flash-attn's."""

DEFAULT_ATTN_IMPL = ATTN_IMPLS[0]


@dataclass(frozen=True, slots=True)
class SideSpec:
    """Which framework holds the weights, sharded how, on which ranks and in which dtype."""

    layout: Layout
    """Parallel sizes and ranks."""
    format: str = DEFAULT_FORMAT
    """A name of `FORMATS`."""
    dtype: Dtype | None = Dtype.BF16
    """Of the parameters; None where a model provider chooses it."""
    transformer_impl: str = "local"
    """Megatron's layer spec."""
    options: SideOptions | None = None
    """Settings of the format, of the class that its row names; None for a format without any."""
    quantisation: Quantisation | None = None
    """With it the side holds codes and scales in place of the weights that it names."""
    attn_impl: str | None = None
    """transformers' `attn_implementation`; None for other libraries' models."""
    autocast: Dtype | None = None
    """With it the parameters are float32, and torch.autocast computes in this dtype."""

    @property
    def held_dtype(self) -> str | None:
        """The dtype of its own in which it holds weights, as codes and scales; None where it holds them as they are."""
        return None if self.quantisation is None else self.quantisation.dtype

    @property
    def compute_dtype(self) -> Dtype | None:
        """What matrix products compute in; None where a model provider chooses it."""
        return self.autocast or self.dtype

    @property
    def ranks(self) -> range:
        return self.layout.ranks

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    def options_as(self, kind: type[T]) -> T:
        """The settings of its format, which are of `kind`; the defaults where it has none."""
        return options_as(self.options, kind)

    @property
    def rearranged(self) -> SideSpec | None:
        """This side once its experts have moved between two refits; None for a side that keeps its placement."""
        return self._with(self.options.rearranged) if self.options is not None else None

    @property
    def places_experts(self) -> bool:
        """Whether this side's format lets a user place experts."""
        return self.options is not None and self.options.places_experts

    @property
    def linear(self) -> SideSpec | None:
        """This side with its experts in order and none twice; None for a side that has them so."""
        return self._with(self.options.linear) if self.options is not None else None

    @property
    def running_engine(self) -> str | None:
        """The Python of the engine that serves it; None where no engine runs."""
        return self.options.running_engine if self.options is not None else None

    def _with(self, options: SideOptions | None) -> SideSpec | None:
        return dataclasses.replace(self, options=options) if options is not None else None

    @property
    def title(self) -> str:
        """`TP2 EP2`; PP and ETP where they are not 1 and TP; the format where it is not Megatron's; what is not the
        default of the attention, and autocast."""
        text = self.options.title(self.layout) if self.options is not None else short_text(self.layout)
        words = [text if self.format == DEFAULT_FORMAT else f"{self.format} {text}"]
        words += [self.attn_impl] if self.attn_impl not in (None, DEFAULT_ATTN_IMPL) else []
        words += ["autocast"] if self.autocast is not None else []
        return " ".join(words if self.quantisation is None else [*words, self.quantisation.dtype])

    @property
    def summary(self) -> str:
        """The sizes for the rank map: `TP=2, PP=1, EP=2`, or the title of a format with settings of its own."""
        return self.layout.summary if self.options is None else self.title
