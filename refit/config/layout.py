"""Layout: the parallel sizes and the ranks of one side, and every rank's coordinates.

Rank order is Megatron's default, tp-cp-ep-dp-pp with the tensor axis fastest and the pipeline axis slowest
(`megatron.core.parallel_state.RankGenerator`). Dense layers see the ranks of a side as [pp, dp, tp], routed
experts see the same ranks as [pp, edp, ep, etp].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from refit.config.limits import MAX_RANKS
from refit.config.pipeline_layout import check_prediction_chunk
from refit.errors import UsageError


class Sizes(Protocol):
    """Anything that has the parallel sizes of one side."""

    @property
    def tp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def etp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def vpp(self) -> int: ...


def short_text(sizes: Sizes) -> str:
    """`TP8 EP8`; ETP where it is not TP, PP and VPP where they are not 1."""
    etp = f" ETP{sizes.etp}" if sizes.etp != sizes.tp else ""
    vpp = f" VPP{sizes.vpp}" if sizes.vpp > 1 else ""
    return f"TP{sizes.tp} EP{sizes.ep}{etp}" + (f" PP{sizes.pp}" if sizes.pp > 1 else "") + vpp


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The index of one rank on each axis, from 0."""

    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes of one side on ranks `first_rank .. first_rank + world_size - 1`.

    world_size = tp * dp * pp = etp * ep * edp * pp.
    """

    tp: int
    """Tensor parallel size."""
    ep: int
    """Expert parallel size."""
    etp: int
    """Tensor parallel size of routed experts."""
    pp: int
    """Pipeline stages."""
    world_size: int
    first_rank: int = 0
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage where the split is uneven; None splits evenly."""
    last_stage_layers: int | None = None
    """The same of the last stage."""
    vpp: int = 1
    """Megatron's virtual pipeline size: each rank holds that many model chunks, one in each pass over the stages."""
    chunk_sizes: tuple[int, ...] | None = None
    """Decoder layers of each chunk in the order of the layers, where they are given one by one
    (`refit.config.pipeline_layout`)."""
    chunk_predictions: tuple[int, ...] | None = None
    """Multi-token prediction layers likewise; None: the last chunk has all."""

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "etp", "pp", "vpp", "world_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vpp > 1 and self.pp == 1:
            raise UsageError(
                f"{self.vpp} virtual pipeline stages per rank need more than one pipeline stage, PP size is 1"
            )
        if self.chunk_sizes is not None and len(self.chunk_sizes) != self.pp * self.vpp:
            raise UsageError(
                f"the pipeline layout has {len(self.chunk_sizes)} stages, PP {self.pp} x VPP {self.vpp} = "
                f"{self.pp * self.vpp} are needed"
            )
        check_prediction_chunk(self.chunk_predictions or (), self.pp)
        if self.first_rank < 0:
            raise UsageError(f"first_rank must be at least 0, got {self.first_rank}")
        if self.ranks.stop > MAX_RANKS:
            before = f"{self.first_rank:,} + " if self.first_rank else ""
            raise UsageError(f"{before}{self.world_size:,} ranks are more than the {MAX_RANKS:,} that can be planned")
        for kind, size in (("TP x PP", self.tp * self.pp), ("ETP x EP x PP", self.etp * self.ep * self.pp)):
            if self.world_size % size:
                raise UsageError(
                    f"{self.world_size} ranks cannot be divided into {kind} = {size}: give a multiple of {size} ranks"
                )

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the dense layers."""
        return self.world_size // (self.tp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel replicas of the routed experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.world_size)

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a global rank. Raises ValueError for a rank outside the layout."""
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not in {self.ranks}")
        local = rank - self.first_rank
        dense, pp = local % (self.world_size // self.pp), local // (self.world_size // self.pp)
        return Coordinates(
            tp=dense % self.tp,
            dp=dense // self.tp,
            pp=pp,
            etp=dense % self.etp,
            ep=dense // self.etp % self.ep,
            edp=dense // (self.etp * self.ep),
        )

    @property
    def prediction_chunk(self) -> int:
        """The number, in the order of layers, of the chunk with the multi-token prediction layers, if there are any."""
        predictions = self.chunk_predictions or ()
        return next((chunk for chunk, count in enumerate(predictions) if count), self.pp * self.vpp - 1)

    def final_norm_stage(self, num_layers: int, num_predictions: int) -> int:
        """The stage with the norm behind the last layer: the last one, but with multi-token prediction layers that of
        the last decoder layer (`has_final_layernorm_in_this_stage` in Megatron-Core's transformer_block.py)."""
        if not num_predictions:
            return self.pp - 1
        last = num_layers - 1
        chunks = self.chunk_layers(num_layers)
        return next(stage for stage, held in enumerate(chunks) if any(last in layers for layers in held))

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """Global layer numbers of each pipeline stage, as Megatron splits them.

        Raises UsageError where the layers do not divide evenly over the stages without a given number.
        """
        ends = [self.first_stage_layers, self.last_stage_layers]
        if self.pp == 1 or ends == [None, None]:
            if num_layers % self.pp:
                raise UsageError(
                    f"{num_layers} layers do not divide by pipeline size {self.pp}: give a divisor of {num_layers}, "
                    "or the layers of the first or last stage, or of each"
                )
            sizes = [num_layers // self.pp] * self.pp
        else:
            sizes = self._uneven_sizes(num_layers)
        starts = [sum(sizes[:stage]) for stage in range(self.pp)]
        return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))

    def chunk_layers(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Global layer numbers of each pipeline stage's chunks: `[stage][chunk]`.

        A stage's layers are cut into `vpp` equal chunks, and layer numbers run over the first chunk of each stage, then
        over the second (`get_transformer_layer_offset` in Megatron-Core). Raises UsageError where they do not divide.
        """
        if self.chunk_sizes is not None:
            return self._given_chunks(self.chunk_sizes, num_layers)
        sizes = [len(layers) for layers in self.stage_layers(num_layers)]
        for stage, size in enumerate(sizes):
            if size % self.vpp:
                raise UsageError(
                    f"{size} layers of pipeline stage {stage} cannot be divided into {self.vpp} virtual stages: "
                    f"give a divisor of {size}"
                )
        sizes = [size // self.vpp for size in sizes]
        starts = [sum(sizes[:stage]) for stage in range(self.pp)]
        return tuple(
            tuple(range(first + start, first + start + size) for first in range(0, num_layers, sum(sizes)))
            for start, size in zip(starts, sizes, strict=True)
        )

    def _given_chunks(self, sizes: tuple[int, ...], num_layers: int) -> tuple[tuple[range, ...], ...]:
        if sum(sizes) != num_layers:
            raise UsageError(f"the pipeline layout has {sum(sizes)} layers, the model has {num_layers}: list each once")
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        chunks = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return tuple(tuple(chunks[stage :: self.pp]) for stage in range(self.pp))

    def _uneven_sizes(self, num_layers: int) -> list[int]:
        given = [size for size in (self.first_stage_layers, self.last_stage_layers) if size is not None]
        between, left = self.pp - len(given), num_layers - sum(given)
        if left < between or (between and left % between) or (not between and left):
            raise UsageError(
                f"{num_layers} layers less {sum(given)} on the uneven stages leave {left} for {between} stages: "
                f"they must divide evenly, at least one each"
            )
        sizes = [left // between] * between if between else []
        if self.first_stage_layers is not None:
            sizes.insert(0, self.first_stage_layers)
        if self.last_stage_layers is not None:
            sizes.append(self.last_stage_layers)
        return sizes

    @property
    def summary(self) -> str:
        """`TP=2, PP=1, EP=2` for the rank map; VPP where it is not 1, ETP where it is not TP, DP where ranks are not
        TP x EP x PP."""
        etp = f", ETP={self.etp}" if self.etp != self.tp else ""
        dp = f", DP={self.dp}" if self.world_size != self.tp * self.ep * self.pp else ""
        vpp = f", VPP={self.vpp}" if self.vpp > 1 else ""
        return f"TP={self.tp}, PP={self.pp}{vpp}, EP={self.ep}{etp}{dp}"
