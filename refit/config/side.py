"""SideSpec: the specification of one side of a refit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from refit.config.layout import Layout, short_text
from refit.config.placement import ExpertPlacement
from refit.config.quantisation import Quantisation
from refit.config.shape import Dtype
from refit.errors import UsageError

MAX_ZERO_STAGE = 2
"""DeepSpeed's stage 3 shards the weights too, which AutoTP sides do not."""


ATTN_IMPLS = ("sdpa", "eager", "flash_attention_2")
"""Implementations of attention that transformers has for its models: torch's, written out, and flash-attn's."""

DEFAULT_ATTN_IMPL = ATTN_IMPLS[0]


class SideOptions(Protocol):
    """The settings that one format alone has, a frozen dataclass.

    Each format's are the field of `SideSpec` with the format's name. Its row of `FORMATS` names the class, and
    `config.flag_names.OPTION_FLAGS` the flag of each field.
    """

    def title(self, layout: Layout) -> str:
        """The sizes of a side, for titles and the rank map: `TP2 EP1 FSDP4`."""
        ...

    @classmethod
    def complete(
        cls, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], given: Mapping[str, int | None]
    ) -> Sized:
        """The settings and sizes of the side `name`. `options` and `given` are the fields and sizes that flags gave.

        `sizes` has the same sizes with defaults in place of None, less `world_size`. Raises UsageError where they
        contradict each other.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sized:
    """The settings of a side's format and its sizes, `world_size` among them."""

    options: SideOptions | None
    sizes: dict[str, int]


def default_sizes(sizes: Mapping[str, int], given: Mapping[str, int | None]) -> dict[str, int]:
    """`sizes` on as many ranks as given, or on TP x EP x PP."""
    return {**sizes, "world_size": given["world_size"] or sizes["tp"] * sizes["ep"] * sizes["pp"]}


def fewest_ranks(layout: Layout) -> int:
    """The smallest world of a Megatron side: PP times the least that TP and ETP x EP divide, since experts are folded
    over TP x DP (`initialize_model_parallel` in parallel_state.py). It is TP x EP x PP where ETP is TP."""
    return layout.pp * math.lcm(layout.tp, layout.etp * layout.ep)


@dataclass(frozen=True, slots=True)
class Fsdp2Options:
    """`replicate_size` is the number of replicas of the sharded model (HSDP): 1 shards over all ranks."""

    replicate_size: int = 1

    def title(self, layout: Layout) -> str:
        """FSDP is the number of ranks that the dense layers are sharded over, beside TP."""
        hsdp = f" HSDP{self.replicate_size}" if self.replicate_size > 1 else ""
        return f"TP{layout.tp} EP{layout.ep} FSDP{layout.world_size // (layout.tp * self.replicate_size)}{hsdp}"

    @classmethod
    def complete(
        cls, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], given: Mapping[str, int | None]
    ) -> Sized:
        return Sized(cls(**options), default_sizes(sizes, given))


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Equal engines of vLLM, each on TP x DP x PP ranks.

    `data_parallel_size` is the number of ranks with the same dense weights (attention data parallelism); experts are
    divided over all ranks of a stage, whole ones with expert parallelism (EP = TP x DP), else slices of each.
    `replicas` is the number of engines. `num_redundant_experts` are the second copies of a layer in an engine; None is
    0, or what the placement's file has. `placement_next` replaces `placement` between two refits. `engine_python` is
    the Python of an environment with vLLM, which then serves the side; None: tensors as vLLM has them, without it.
    `engine_sleep` is the level at which it sleeps before each refit: 1 keeps its weights in host memory, 2 drops them.
    """

    data_parallel_size: int = 1
    replicas: int = 1
    num_redundant_experts: int | None = None
    placement: ExpertPlacement = field(default_factory=ExpertPlacement)
    placement_next: ExpertPlacement | None = None
    engine_python: str | None = None
    engine_sleep: int = 0

    def title(self, layout: Layout) -> str:
        """`TP2 DP4 EP8`, and what is not the default: `PP2 round_robin +8 x2` has 8 redundant experts, 2 engines;
        `running` has a vLLM that runs."""
        words = [f"TP{layout.tp}", f"EP{layout.ep}"]
        if self.data_parallel_size > 1:
            words.insert(1, f"DP{self.data_parallel_size}")
        if layout.pp > 1:
            words.append(f"PP{layout.pp}")
        if self.placement != ExpertPlacement():
            words.append("placed" if self.placement.is_file else self.placement.name)
        if self.num_redundant_experts:
            words.append(f"+{self.num_redundant_experts}")
        if self.replicas > 1:
            words.append(f"x{self.replicas}")
        if self.engine_python is not None:
            words.append("running")
        return " ".join(words)

    @classmethod
    def complete(
        cls, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], given: Mapping[str, int | None]
    ) -> Sized:
        """Where ranks are given and DP is not, DP is what fills them. Experts are whole where the source has EP."""
        tp, pp, world = sizes["tp"], sizes["pp"], given["world_size"]
        replicas = options.get("replicas", 1)
        dp = options.get("data_parallel_size", world // (tp * pp * replicas) or 1 if world else 1)
        ranks = tp * dp * pp * replicas
        if world not in (None, ranks):
            raise UsageError(
                f"{world} ranks are no TP x DP x PP x engines = {tp} x {dp} x {pp} x {replicas} = {ranks}: "
                f"give {ranks}, or leave them out"
            )
        ep = given["ep"] or (tp * dp if sizes["ep"] > 1 else 1)
        if ep not in (1, tp * dp):
            raise UsageError(
                f"EP size {ep} of an engine with TP x DP = {tp} x {dp}: vLLM has whole experts on all {tp * dp} ranks "
                f"or slices of each, give EP {f'{tp * dp} or 1' if tp * dp > 1 else 1}, or raise DP"
            )
        return Sized(cls(**{**options, "data_parallel_size": dp}), {**sizes, "ep": ep, "world_size": ranks})


@dataclass(frozen=True, slots=True)
class AutotpOptions:
    """`zero_stage` is DeepSpeed's: 0 repeats the optimizer's state on all DP ranks, 1 shards it, 2 gradients too.

    None builds the engine without an optimizer. Destinations are built so: they do not train.
    """

    zero_stage: int | None = 1

    def title(self, layout: Layout) -> str:
        """DP is the number of replicas of the model."""
        zero = "" if self.zero_stage is None else f" ZeRO{self.zero_stage}"
        return f"TP{layout.tp} DP{layout.world_size // layout.tp}{zero}"

    @classmethod
    def complete(
        cls, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], given: Mapping[str, int | None]
    ) -> Sized:
        settings = cls(zero_stage=None) if name == "destination" else cls(**options)
        return Sized(settings, default_sizes(sizes, given))


@dataclass(frozen=True, slots=True)
class SideSpec:
    """Which framework holds the weights, sharded how, on which ranks and in which dtype.

    `format` is a name of `FORMATS`; `layout` has the parallel sizes and the ranks. `dtype` is that of the parameters,
    None where a model provider chooses it. `transformer_impl` is Megatron's layer spec. `fsdp2`, `autotp` and `vllm`
    are for the format of that name alone. With `quantisation` the side holds codes and scales in place of the weights
    that it names.

    `attn_impl` is transformers' `attn_implementation`, None for other libraries' models. With `autocast` the parameters
    are float32, and torch.autocast computes in that dtype.
    """

    layout: Layout
    format: str = "megatron"
    dtype: Dtype | None = Dtype.BF16
    transformer_impl: str = "local"
    fsdp2: Fsdp2Options | None = None
    autotp: AutotpOptions | None = None
    vllm: VllmOptions | None = None
    quantisation: Quantisation | None = None
    attn_impl: str | None = None
    autocast: Dtype | None = None

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

    @property
    def options(self) -> SideOptions | None:
        """The settings of this side's format; None for a format without any."""
        options: SideOptions | None = getattr(self, self.format, None)
        return options

    @property
    def rearranged(self) -> SideSpec | None:
        """This side with its experts placed as `placement_next` says; None for a side that keeps its placement."""
        if self.vllm is None or self.vllm.placement_next is None:
            return None
        options = dataclasses.replace(self.vllm, placement=self.vllm.placement_next, placement_next=None)
        return dataclasses.replace(self, vllm=options)

    @property
    def places_experts(self) -> bool:
        """Whether this side's format lets a user place experts."""
        return self.vllm is not None

    @property
    def linear(self) -> SideSpec | None:
        """This side with its experts in order and none twice; None for a side that has them so."""
        if self.vllm is None:
            return None
        if self.vllm.placement == ExpertPlacement() and not self.vllm.num_redundant_experts:
            return None
        options = VllmOptions(self.vllm.data_parallel_size, self.vllm.replicas)
        return dataclasses.replace(self, vllm=options)

    @property
    def title(self) -> str:
        """`TP2 EP2`; PP and ETP where they are not 1 and TP; the format where it is not Megatron's; what is not the
        default of the attention, and autocast."""
        text = self.options.title(self.layout) if self.options is not None else short_text(self.layout)
        words = [text if self.format == "megatron" else f"{self.format} {text}"]
        words += [self.attn_impl] if self.attn_impl not in (None, DEFAULT_ATTN_IMPL) else []
        words += ["autocast"] if self.autocast is not None else []
        return " ".join(words if self.quantisation is None else [*words, self.quantisation.dtype])

    @property
    def summary(self) -> str:
        """The sizes for the rank map: `TP=2, PP=1, EP=2`, or the title of a format with settings of its own."""
        return self.layout.summary if self.options is None else self.title
