"""The least time of a pass through an engine: each part at the speed of memory or of arithmetic, then its collectives.

The parts of a layer follow one another, and so do layers, so their times add up. Within a part memory and arithmetic
work at the same time, and the slower one counts (Williams et al. 2009, "Roofline"). Left out are what is small or not
known: latencies of launches and messages, activations, sampling. So a real pass takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from refit.config.clusters import Cluster
from refit.config.routing import UNIFORM, Routing
from refit.config.shape import Dtype, ModelShape
from refit.plan.sharding import ITEMSIZE
from refit.predict.flops import delta_rule_flops
from refit.predict.kv_cache import delta_state_bytes, kv_bytes_of_layer
from refit.predict.serving.experts import Slots
from refit.predict.serving.held import ATTENTION, DENSE, OUTPUT, ROUTED, SHARED, Part, parts_of
from refit.predict.serving.layout import Served, Stage
from refit.predict.serving.network import NOTHING, Moved, all_reduce, dispatch, send

CACHE, ALL_REDUCE, ALL_TO_ALL, SENDS = "attention over the cache", "all-reduce", "expert all-to-all", "pipeline sends"
MEMORY, FLOPS, NODE, NETWORK = "memory", "FLOP/s", "links in a node", "links between nodes"
"""What limits a term."""

FP8_BYTES = 1
"""Of an element of a token that goes to experts in FP8; it comes back in the side's dtype (DeepSeek-V3, 3.2.2)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What goes through an engine at a time: on each attention replica `sequences`, each with `new` tokens behind
    `cached` ones. `all_logits`: the output layer computes every token, not the last of each sequence alone."""

    sequences: float
    new: int
    cached: int = 0
    all_logits: bool = False

    @property
    def tokens(self) -> float:
        return self.sequences * self.new

    @property
    def pairs(self) -> float:
        """Pairs of a token and one that it attends to: those before it, and of the new ones half on average."""
        return self.sequences * (self.cached if self.new == 1 else self.new * (self.cached + self.new / 2))


@dataclass(frozen=True, slots=True)
class Term:
    """A part of a pass on its busiest GPU: bytes of memory, operations in FP8 and in other dtypes, or bytes moved."""

    name: str
    nbytes: float = 0.0
    fp8_flops: float = 0.0
    other_flops: float = 0.0
    moved: Moved = NOTHING
    seconds: float = 0.0
    limited_by: str = MEMORY

    def timed(self, cluster: Cluster) -> Term:
        """With its time on `cluster`, which has all speeds that it needs."""
        memory = self.nbytes / (cluster.memory_bytes_per_s or math.inf)
        flops = self.other_flops / (cluster.bf16_flops_per_s or math.inf)
        flops += self.fp8_flops / (cluster.fp8_flops_per_s or math.inf)
        moved = self.moved.seconds(cluster)
        between = self.moved.between / (cluster.inter_bytes_per_s or math.inf)
        links = NETWORK if (self.moved.between and moved <= between) or math.isinf(moved) else NODE
        seconds, limit = max((memory, MEMORY), (flops, FLOPS), (moved, links), key=lambda each: each[0])
        return replace(self, seconds=seconds, limited_by=limit)

    def times(self, factor: float) -> Term:
        return replace(
            self,
            nbytes=factor * self.nbytes,
            fp8_flops=factor * self.fp8_flops,
            other_flops=factor * self.other_flops,
            moved=self.moved.times(factor),
            seconds=factor * self.seconds,
        )


@dataclass(frozen=True, slots=True)
class PassBound:
    """The terms of a pass through `stage`, the slowest of its engine's, `passes` times: they add up to `seconds`."""

    terms: tuple[Term, ...]
    stage: int
    passes: int = 1

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    @property
    def largest(self) -> Term:
        return max(self.terms, key=lambda term: term.seconds)


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine's layout with what its ranks hold, and the hardware: what bounds of its passes follow from."""

    shape: ModelShape
    dtype: Dtype
    served: Served
    cluster: Cluster
    routing: Routing = UNIFORM

    def decode(self, sequences: int, context: int) -> PassBound:
        """A step that decodes one token of each of `sequences` on every attention replica, `context` tokens cached.

        With PP stages the sequences are cut into as many groups, which follow one another through them.
        """
        stages = len(self.served.stages)
        found = self._slowest(Pass(math.ceil(sequences / stages), 1, context))
        return replace(found, terms=tuple(term.times(stages) for term in found.terms), passes=stages)

    def prefill(self, sequences: float, length: int, *, all_logits: bool = False) -> PassBound:
        """Prefill of `sequences` of `length` tokens on every attention replica, in one pass: weights are read once, and
        stages work at the same time."""
        return self._slowest(Pass(sequences, length, all_logits=all_logits))

    def _slowest(self, work: Pass) -> PassBound:
        bounds = [PassBound(tuple(self._terms(work, number)), number) for number in range(len(self.served.stages))]
        return max(bounds, key=lambda bound: bound.seconds)

    def _terms(self, work: Pass, number: int) -> Iterator[Term]:
        """Of the stage's busiest rank, timed; without those that are nothing."""
        stage, is_last = self.served.stages[number], number == len(self.served.stages) - 1
        tokens = {ATTENTION: work.tokens, DENSE: work.tokens, SHARED: work.tokens}
        if self.served.scatters:
            tokens[SHARED] /= self.served.tp
        if is_last:
            tokens[OUTPUT] = work.tokens if work.all_logits else work.sequences
        routed = [layer for layer in stage.layers if layer in self.served.placed]
        parts = parts_of(stage, max(1, len(routed)), self.shape.tied_embeddings)
        found = [_weights(name, parts[name], each) for name, each in tokens.items() if name in parts]
        found.insert(1, self._over_cache(work, stage))
        if routed:
            found += self._experts(work, stage, routed, parts[ROUTED])
        found.append(self._all_reduces(work, stage, number == 0))
        if not is_last:
            found.append(self._sends(work, stage, self.served.stages[number + 1]))
        for term in found:
            timed = term.timed(self.cluster)
            if timed.seconds:
                yield timed

    def _over_cache(self, work: Pass, stage: Stage) -> Term:
        """Scores and weighted values, and the states of delta nets. A decode step of latent attention works on the
        latent (DeepSeek-V2, 2.1)."""
        shape, heads = self.shape, self.shape.num_attention_heads / self.served.tp
        if shape.mla is None:
            widths = 2 * shape.kv_channels
        elif work.new == 1:
            widths = 2 * shape.mla.kv_lora_rank + shape.mla.qk_pos_emb_head_dim
        else:
            widths = shape.mla.qk_head_dim + shape.mla.qk_pos_emb_head_dim + shape.mla.v_head_dim
        nets = sum(shape.kinds[layer].delta_net for layer in stage.layers)
        layers = len(stage.layers) - nets
        nbytes = work.sequences * max(work.cached, work.new) * kv_bytes_of_layer(shape, self.served.tp) * layers
        flops = 2 * heads * widths * work.pairs * layers
        if shape.delta_net is not None:
            nbytes += work.sequences * delta_state_bytes(shape.delta_net, self.served.tp) * nets
            flops += work.tokens * delta_rule_flops(shape.delta_net) / self.served.tp * nets
        return Term(CACHE, nbytes, other_flops=flops)

    def _experts(self, work: Pass, stage: Stage, routed: Sequence[int], expert: Part) -> tuple[Term, Term]:
        """Those that are hit, on the rank where they take longest, layer by layer; and the way there and back."""
        experts, served = self.shape.experts, self.served
        assert experts is not None
        likely = dict(zip(served.placed, self.routing.probabilities(experts), strict=True))
        # Tokens of all replicas whose experts these are; within a TP group whose ranks have several, a share of them.
        tokens = work.tokens * served.span / served.tp
        known: dict[object, tuple[Term, Term]] = {}
        busiest, crossing = Term(ROUTED), Term(ALL_TO_ALL)
        for layer in routed:
            kind = (id(served.placed[layer]), likely[layer])
            if kind not in known:
                slots = Slots.of(served.placed[layer], likely[layer])
                known[kind] = self._layer(expert, slots, tokens), self._to_experts(slots, stage, tokens, expert)
            busiest, crossing = _sum(busiest, known[kind][0]), _sum(crossing, known[kind][1])
        return busiest, crossing

    def _layer(self, expert: Part, slots: Slots, tokens: float) -> Term:
        """One layer, on the rank where it takes longest."""
        work = zip(slots.distinct(tokens).tolist(), slots.pairs(tokens).tolist(), strict=True)
        terms = (
            Term(ROUTED, distinct * expert.nbytes, 2 * pairs * expert.fp8, 2 * pairs * expert.other)
            for distinct, pairs in dict.fromkeys(work)
        )
        return max(terms, key=lambda term: term.timed(self.cluster).seconds)

    def _to_experts(self, slots: Slots, stage: Stage, tokens: float, expert: Part) -> Term:
        if not self.served.crosses_replicas:
            return Term(ALL_TO_ALL)
        experts, served = self.shape.experts, self.served
        assert experts is not None
        width = experts.latent_size or self.shape.hidden_size
        nbytes = width * ((FP8_BYTES if expert.fp8 else self._itemsize) + self._itemsize)
        group = stage.ranks[: served.span]
        moved = dispatch(nbytes, tokens, slots, group, served.etp, self.cluster.gpus_per_node)
        return Term(ALL_TO_ALL, moved=moved)

    def _all_reduces(self, work: Pass, stage: Stage, is_first: bool) -> Term:
        """One behind the attention and one behind the MLP of each layer, and one behind the embedding. Where tokens
        leave for their experts, a reduce-scatter before and an all-gather after them: as much as one."""
        experts, crosses = self.shape.experts, self.served.crosses_replicas
        routed = sum(experts.layers[layer] for layer in stage.layers) if experts is not None and crosses else 0
        count = int(is_first) + 2 * len(stage.layers) - routed
        nbytes = work.tokens * self.shape.hidden_size * self._itemsize
        moved = all_reduce(nbytes, stage.ranks[: self.served.tp], self.cluster.gpus_per_node)
        return Term(ALL_REDUCE, moved=moved.times(count))

    def _sends(self, work: Pass, stage: Stage, following: Stage) -> Term:
        """To the next stage, each TP rank its share."""
        nbytes = work.tokens * self.shape.hidden_size * self._itemsize / self.served.tp
        return Term(SENDS, moved=send(nbytes, stage.ranks[0], following.ranks[0], self.cluster.gpus_per_node))

    @property
    def _itemsize(self) -> int:
        return ITEMSIZE[self.dtype.value]


def _weights(name: str, part: Part, tokens: float) -> Term:
    """Weights that every token is multiplied with."""
    return Term(name, part.nbytes, 2 * tokens * part.fp8, 2 * tokens * part.other)


def _sum(one: Term, other: Term) -> Term:
    """Of two layers, not yet timed."""
    return replace(
        one,
        nbytes=one.nbytes + other.nbytes,
        fp8_flops=one.fp8_flops + other.fp8_flops,
        other_flops=one.other_flops + other.other_flops,
        moved=one.moved + other.moved,
    )
