"""What every rank of a DeepSpeed AutoTP side holds, predicted from the flags: no model, no DeepSpeed, no torch.

The side is a transformers model under `deepspeed.initialize`. Its ranks are [dp, tp], tp fastest; each group of tp
ranks holds the model once. ZeRO stages 0 to 2 shard no weights. AutoTP splits the projections of attention, of dense
MLPs and of shared experts, and the output layer by rows. Embeddings are split where they are the output layer's (tied),
else whole, as are norms, routers, latent down projections, routed experts and buffers. Every parameter has the side's
dtype: DeepSpeed casts those too that transformers keeps in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refit.config.layout import Layout
from refit.config.options import SideOptions, Sized, default_sizes, side_setting
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.sharding import Sharding
from refit.predict.families.names import NamedTensor, named_model
from refit.predict.families.sharding import check_family, sharding_of
from refit.predict.families.tables import EMBEDDING, OUTPUT
from refit.predict.megatron import Split

MAX_ZERO_STAGE = 2
"""DeepSpeed's stage 3 shards the weights too, which AutoTP sides do not."""


@dataclass(frozen=True, slots=True)
class AutotpOptions(SideOptions):
    """`zero_stage` is DeepSpeed's: 0 repeats the optimizer's state on all DP ranks, 1 shards it, 2 gradients too.

    None builds the engine without an optimizer. Destinations are built so: they do not train.
    """

    zero_stage: int | None = side_setting(
        1,
        source="zero-stage",
        metavar="N",
        least=0,
        most=MAX_ZERO_STAGE,
        help="ZeRO stage, 0 to 2; default: 1",
    )

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

    @property
    def recorded(self) -> dict[str, Any]:
        return {"zero_stage": self.zero_stage}


def check(shape: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where transformers has no such model or AutoTP cannot split it; `name` is the side's."""
    check_family(shape, side, name)
    if (shape.qk_norm_over_heads or shape.attention_sinks) and side.layout.tp > 1:
        what = "sinks" if shape.attention_sinks else "norms"
        raise UsageError(
            f"{name}: AutoTP leaves {what} whole, which do not fit the heads of TP size {side.layout.tp}: give TP 1, "
            f"or FSDP2, whose {what} are split here"
        )
    if shape.delta_net is not None and side.layout.tp > 1:
        raise UsageError(
            f"{name}: AutoTP sides with delta nets are built with TP 1 only, this one has TP size {side.layout.tp}: "
            "give TP 1, or FSDP2, whose delta nets are split here"
        )
    if shape.vocab_size < side.layout.tp:
        raise UsageError(
            f"{name}: AutoTP wants a part of the vocabulary on every rank, it has {shape.vocab_size} rows for TP size "
            f"{side.layout.tp}"
        )


def predict(shape: ModelShape, side: SideSpec) -> Sharding:
    """What every rank of `side` holds, by canonical keys. Raises UsageError as `check` does."""
    check(shape, side, "this layout")
    assert side.dtype is not None, "flags that describe a model give its dtype"
    tp = side.layout.tp
    model = named_model(shape, side.dtype)
    return sharding_of(model, side.ranks, lambda tensor, local: held_box(tensor, shape, tp, local % tp))


def held_box(tensor: NamedTensor, shape: ModelShape, tp: int, tp_rank: int) -> Box | None:
    """The part of `tensor` that rank `tp_rank` of a TP group holds; None for an empty one."""
    box = Box.whole(tensor.shape)
    if tp == 1 or not is_split(tensor, shape):
        return box
    dim = int(tensor.row.split is Split.ROW)
    sizes = part_sizes(box.extents[dim], tp, _split_by_heads(tensor, shape))
    begin = sum(sizes[:tp_rank])
    return box.narrow(dim, begin, begin + sizes[tp_rank]) if sizes[tp_rank] else None


def is_split(tensor: NamedTensor, shape: ModelShape) -> bool:
    """Whether AutoTP splits `tensor`. DeepSpeed cannot split a whole layer's experts in one tensor."""
    if tensor.row.routed or tensor.row.split is Split.REPLICATED:
        return False
    return tensor.row.key != EMBEDDING or shape.tied_embeddings


def part_sizes(size: int, tp: int, num_heads: int | None) -> Sequence[int]:
    """How AutoTP divides `size` rows or columns over `tp` ranks; the first ranks get what is over.

    Whole key-value heads with their queries, else single rows. Source: `get_shard_size` of
    deepspeed/module_inject/tp_shard.py, with a `tp_grain_size` of 1.
    """
    units = num_heads or size
    return [size // units * (units // tp + (rank < units % tp)) for rank in range(tp)]


def _split_by_heads(tensor: NamedTensor, shape: ModelShape) -> int | None:
    """The key-value heads that `tensor` is divided by; None outside attention."""
    attention = "mlp" not in tensor.name and tensor.row.key not in (EMBEDDING, OUTPUT)
    return _num_key_value_heads(shape) if attention else None


def _num_key_value_heads(shape: ModelShape) -> int:
    return shape.num_query_groups if shape.mla is None else shape.num_attention_heads
