"""The engines of a vLLM side: their sizes, the place of every rank, and the layers of every stage.

An engine's ranks are [dp, pp, tp], tp fastest (`initialize_model_parallel` in distributed/parallel_state.py). The
experts of a stage are divided over its ranks [dp, tp] (`FusedMoEParallelConfig.make`). Engines follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass

from refit.config.layout import Layout
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.vllm.options import VllmOptions


@dataclass(frozen=True, slots=True)
class Place:
    """The coordinates of a rank in its engine. `expert` is its number among the ranks of its stage."""

    stage: int
    dp: int
    tp: int
    expert: int


@dataclass(frozen=True, slots=True)
class Engine:
    """The sizes of one engine. `expert_tp` slices every expert where `ep` is 1, and is 1 where experts are whole."""

    tp: int
    dp: int
    pp: int
    ep: int
    expert_tp: int

    @classmethod
    def of(cls, side: SideSpec) -> Engine:
        """Raises UsageError, with both numbers, where the layout is none of such engines."""
        layout, options = side.layout, side.options_as(VllmOptions)
        shared = layout.tp * options.data_parallel_size
        engine = cls(layout.tp, options.data_parallel_size, layout.pp, layout.ep, shared // layout.ep)
        ranks = engine.num_ranks * options.replicas
        if layout.vpp > 1:
            raise UsageError(f"vLLM has 1 model chunk per rank, not {layout.vpp}: leave virtual pipeline stages out")
        if layout.world_size != ranks:
            raise UsageError(
                f"{layout.world_size} ranks are no {options.replicas} engines of {engine.num_ranks}: give {ranks}"
            )
        if layout.ep not in (1, shared):
            raise UsageError(
                f"EP size {layout.ep} of an engine with TP x DP = {shared}: give EP {shared} (whole experts) or 1 "
                "(slices)"
            )
        return engine

    @property
    def num_ranks(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def replicates_shared_experts(self) -> bool:
        """vLLM's `use_sequence_parallel_moe` (config/parallel.py): each TP rank has other tokens in its MoE layers."""
        return self.ep > 1 and self.tp > 1 and self.dp > 1

    def place(self, local: int) -> Place:
        """The coordinates of rank number `local` of all engines together."""
        rest, tp = divmod(local % self.num_ranks, self.tp)
        dp, stage = divmod(rest, self.pp)
        return Place(stage, dp, tp, dp * self.tp + tp)


def stage_layers(layout: Layout, num_layers: int) -> tuple[range, ...]:
    """The layers of each pipeline stage: as given (`VLLM_PP_LAYER_PARTITION`), or by vLLM's `get_pp_indices`
    (distributed/utils.py).

    What PP does not divide goes to the stages before the last one, one layer each.
    """
    if layout.chunk_sizes is not None:
        return tuple(chunks[0] for chunks in layout.chunk_layers(num_layers))
    if layout.first_stage_layers is not None or layout.last_stage_layers is not None:
        return layout.stage_layers(num_layers)
    size, rest = divmod(num_layers, layout.pp)
    if not size:
        raise UsageError(f"{num_layers} layers are fewer than {layout.pp} pipeline stages: lower PP to {num_layers}")
    sizes = [size] * layout.pp
    for back in range(2, rest + 2):
        sizes[-back] += 1
    starts = [sum(sizes[:stage]) for stage in range(layout.pp)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
