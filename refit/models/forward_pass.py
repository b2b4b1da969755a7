"""What two models show of a forward pass so that the passes can be compared layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router of one MoE layer did with every token. Both are `[batch, sequence, num_experts]`.

    `scores`, float32, are those by which experts are chosen: what the top-k is taken of, or its logarithm. `chosen`
    says which were.
    """

    scores: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What this rank knows of a forward pass. Layers are numbered from 0 in the whole model.

    `states` are the hidden states `[batch, sequence, hidden_size]` that reached each layer, float32; those behind the
    last one have the number of layers as theirs. `routing` has the MoE layers. `logits` are `[batch, sequence,
    vocab_size]`, float32, None on ranks without any.
    """

    logits: torch.Tensor | None = None
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)
    routing: Mapping[int, Routing] = field(default_factory=dict)


class Trace:
    """Collects the states and the routing of a pass while it runs.

    With the states of another pass, `replayed`, each layer computes with these in place of its own. So a difference of
    two models shows in the layer where it arises, and does not grow in those behind it.
    """

    def __init__(self, replayed: Mapping[int, torch.Tensor] | None = None) -> None:
        self._replayed = replayed or {}
        self._states: dict[int, torch.Tensor] = {}
        self.routing: dict[int, Routing] = {}

    def reached(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` `[batch, sequence, hidden_size]` has reached `layer`. Returns what the layer is to compute with."""
        self._states[layer] = hidden.float().contiguous()
        return self._replayed[layer].to(hidden.device, hidden.dtype) if self._replayed else hidden

    def ended(self, logits: torch.Tensor | None) -> ForwardPass:
        """The pass, which gave these logits on this rank."""
        return ForwardPass(logits.float() if logits is not None else None, self._states, self.routing)
