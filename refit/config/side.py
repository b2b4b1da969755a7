"""SideSpec: the specification of one side of a refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from refit.config.layout import Layout, short_text
from refit.config.shape import Dtype

MAX_ZERO_STAGE = 2
"""DeepSpeed's stage 3 shards the weights too, which AutoTP sides do not."""


class SideOptions(Protocol):
    """The settings that one format alone has, a frozen dataclass.

    Each format's are the field of `SideSpec` with the format's name. Its row of `FORMATS` names the class, and
    `config.flag_names.OPTION_FLAGS` the flag of each field.
    """

    def title(self, layout: Layout) -> str:
        """The sizes of a side, for titles and the rank map: `TP2 EP1 FSDP4`."""
        ...


@dataclass(frozen=True, slots=True)
class Fsdp2Options:
    """`replicate_size` is the number of replicas of the sharded model (HSDP): 1 shards over all ranks."""

    replicate_size: int = 1

    def title(self, layout: Layout) -> str:
        """FSDP is the number of ranks that the dense layers are sharded over, beside TP."""
        hsdp = f" HSDP{self.replicate_size}" if self.replicate_size > 1 else ""
        return f"TP{layout.tp} EP{layout.ep} FSDP{layout.world_size // (layout.tp * self.replicate_size)}{hsdp}"


@dataclass(frozen=True, slots=True)
class AutotpOptions:
    """`zero_stage` is DeepSpeed's: 0 repeats the optimizer's state on all DP ranks, 1 shards it, 2 gradients too."""

    zero_stage: int = 1

    def title(self, layout: Layout) -> str:
        """DP is the number of replicas of the model."""
        return f"TP{layout.tp} DP{layout.world_size // layout.tp} ZeRO{self.zero_stage}"


@dataclass(frozen=True, slots=True)
class SideSpec:
    """Which framework holds the weights, sharded how, on which ranks and in which dtype.

    `format` is a name of `FORMATS`; `layout` has the parallel sizes and the ranks. `dtype` is that of the parameters,
    None where a model provider chooses it. `transformer_impl` is Megatron's layer spec. `fsdp2` and `autotp` are for
    the format of that name alone.
    """

    layout: Layout
    format: str = "megatron"
    dtype: Dtype | None = Dtype.BF16
    transformer_impl: str = "local"
    fsdp2: Fsdp2Options | None = None
    autotp: AutotpOptions | None = None

    @property
    def ranks(self) -> range:
        return self.layout.ranks

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def options(self) -> SideOptions | None:
        """The settings of this side's format; None for a format without any."""
        options: SideOptions | None = getattr(self, self.format, None)
        return options

    @property
    def title(self) -> str:
        """`TP2 EP2`; PP and ETP where they are not 1 and TP; the format where it is not Megatron's."""
        text = self.options.title(self.layout) if self.options is not None else short_text(self.layout)
        return text if self.format == "megatron" else f"{self.format} {text}"

    @property
    def summary(self) -> str:
        """The sizes for the rank map: `TP=2, PP=1, EP=2`, or the title of a format with settings of its own."""
        return self.layout.summary if self.options is None else self.title
