"""`--check-forward`: run both models on the same tokens and compare them, after the weights were compared as bits.

The bit comparison checks the weights. This checks that both layouts use the weights as the same model. Two things would
hide a fault, or look like one: rounding, which deep models with routers amplify until tokens go to other experts, and
the rounding that the refit itself does. So both sides compute in float32 with the same values (`as_moved`), and each
layer of the destination gets the hidden states that reached this layer at the source. What then differs arose in that
layer: its depth does not matter.

Where two experts nearly tie, a token may still go to another one. Routers' scores are compared too: such a choice is
right if the scores of the experts that differ are within the tolerance, and what this layer adds to this token is left
out. Any other difference is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from refit.bench.as_moved import as_moved
from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.errors import RefitError, UnavailableError
from refit.models.forward_pass import ForwardPass, Routing
from refit.results.refit import ForwardCheck

NUM_SEQUENCES, SEQ_LENGTH = 4, 16
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Largest difference that counts as equal, relative to the largest of what a layer adds, of its router's scores, or of
the logits. On GPUs libraries may multiply float32 with the 10 bits of TF32. A wrong tensor is off by far more."""
MIN_COMPARED = 0.5
"""Share of the tokens that must be left in each layer for a verdict."""


def compare_forward(session: Session, source: Side, destination: Side) -> ForwardCheck:
    """Run both models on the same tokens and compare them. Collective: every rank of the job.

    The check is skipped, with the reason, where a rank cannot run its side forward.
    """
    shape = session.scenario.model
    if shape is None:
        return _skipped("a model from --model-provider has no known vocabulary to draw tokens from")
    mine = next((reason for side in (source, destination) if (reason := _obstacle(side))), None)
    reason = next((reason for reason in gather(session.control, mine) if reason is not None), None)
    if reason is not None:
        return _skipped(reason)
    size = (NUM_SEQUENCES, min(SEQ_LENGTH, shape.max_position_embeddings))
    tokens = torch.randint(shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    with as_moved(session, source, destination):
        expected = _whole_pass(session, source, tokens)
    found = _whole_pass(session, destination, tokens, expected.states)
    return compared(expected, found, TOLERANCE[session.device.type])


def compared(expected: ForwardPass, found: ForwardPass, tolerance: float) -> ForwardCheck:
    """The verdict on two whole passes, the second with the states of the first. Raises RefitError where they have
    different layers."""
    for name in ("states", "routing"):
        ours, theirs = (sorted(getattr(side, name)) for side in (expected, found))
        if ours != theirs:
            raise RefitError(f"the forward passes have {name} of other layers: {ours} and {theirs}")
    assert expected.logits is not None
    assert found.logits is not None
    tally = _Tally(expected.logits.shape[:2], tolerance)
    for layer, state in sorted(expected.states.items()):
        before = expected.states.get(layer - 1)
        tally.add_state(layer, state, found.states[layer], state if before is None else state - before)
        if layer in expected.routing:
            tally.add_router(layer, expected.routing[layer], found.routing[layer])
    tally.add_logits(expected.logits, found.logits)
    num_experts, num_reached = _reached(expected.routing)
    num_layers = len(expected.states) - 1
    return replace(tally.verdict, num_layers=num_layers, num_experts=num_experts, num_reached=num_reached)


class _Tally:
    """What was found of each token, `[batch, sequence]`: whether it disagrees anywhere, and whether what the current
    layer adds to it is left out."""

    def __init__(self, shape: torch.Size, tolerance: float) -> None:
        self._tolerance = tolerance
        self._wrong, self._left_out = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        self._num_excluded = 0
        self._first_wrong: str | None = None
        self._undecided: str | None = None
        self._differences: dict[str, float] = {}
        self._logits = (0.0, 0.0)

    def add_state(self, layer: int, ours: torch.Tensor, theirs: torch.Tensor, added: torch.Tensor) -> None:
        """States that reach `layer`. `added` is what the layer before it adds."""
        difference = (ours - theirs).abs().amax(-1) / added.abs().max()
        self._compare(f"layer {layer - 1}" if layer else "the embedding", "layer", difference)
        self._left_out = torch.zeros_like(self._left_out)

    def add_router(self, layer: int, ours: Routing, theirs: Routing) -> None:
        scale = ours.scores.abs().max()
        flipped = (ours.chosen != theirs.chosen).any(-1)
        # Of two experts whose scores are off by the tolerance, the gap is off by twice that.
        difference = torch.maximum((ours.scores - theirs.scores).abs().amax(-1), _gap(ours, theirs) / 2) / scale
        self._compare(f"the router of layer {layer}", "router", difference)
        self._left_out = flipped & ~self._wrong
        num_left_out, num_tokens = int(self._left_out.sum()), flipped.numel()
        self._num_excluded += num_left_out
        if num_tokens - num_left_out < MIN_COMPARED * num_tokens and self._undecided is None:
            self._undecided = (
                f"near ties of the experts of layer {layer} leave {num_tokens - num_left_out} of {num_tokens} tokens "
                f"to compare, at least {MIN_COMPARED * num_tokens:.0f} are needed: check weights whose experts differ"
            )

    def add_logits(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        difference, scale = (ours - theirs).abs().amax(-1), ours.abs().max()
        self._compare("the logits", "logits", difference / scale)
        self._logits = (float(difference.max()), float(scale))

    @property
    def verdict(self) -> ForwardCheck:
        is_wrong = self._first_wrong is not None
        return ForwardCheck(
            passed=not is_wrong,
            skipped=None if is_wrong else self._undecided,
            agreement=1 - float(self._wrong.float().mean()),
            max_difference=self._logits[0],
            max_logit=self._logits[1],
            tolerance=self._tolerance,
            num_tokens=self._wrong.numel(),
            num_excluded=self._num_excluded,
            layer_difference=self._differences["layer"],
            router_difference=self._differences.get("router"),
            first_wrong=self._first_wrong,
        )

    def _compare(self, what: str, kind: str, difference: torch.Tensor) -> None:
        """Tokens with a `difference` beyond the tolerance are wrong."""
        difference = difference.masked_fill(self._left_out, 0).nan_to_num(torch.inf)  # NaN agrees with nothing
        self._differences[kind] = max(self._differences.get(kind, 0.0), float(difference.max()))
        wrong = difference > self._tolerance
        if self._first_wrong is None and wrong.any():
            self._first_wrong = what
        self._wrong |= wrong


def _reached(routing: Mapping[int, Routing]) -> tuple[int, int]:
    """How many experts there are in all layers, and how many of them some token chose."""
    chosen = [layer.chosen.flatten(0, 1) for layer in routing.values()]
    return sum(each.size(-1) for each in chosen), sum(int(each.any(0).sum()) for each in chosen)


def _gap(ours: Routing, theirs: Routing) -> torch.Tensor:
    """By how much our scores of the experts that only we chose lie above those of the experts that only they chose, at
    most: `[batch, sequence]`. Minus infinity where both chose the same."""
    only_ours, only_theirs = ours.chosen & ~theirs.chosen, theirs.chosen & ~ours.chosen
    highest = ours.scores.masked_fill(~only_ours, -torch.inf).amax(-1)
    return highest - ours.scores.masked_fill(~only_theirs, torch.inf).amin(-1)


def _skipped(reason: str) -> ForwardCheck:
    return ForwardCheck(passed=True, skipped=reason)


def _obstacle(side: Side) -> str | None:
    """The reason why this rank cannot run its part of `side` forward; None if it can."""
    try:
        side.model.check_forward()
    except UnavailableError as error:
        return str(error)
    return None


def _whole_pass(
    session: Session, side: Side, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None
) -> ForwardPass:
    """The side's pass on every rank: each part from the first rank that has it. Collective: every rank of the job."""
    mine = side.model.forward(tokens, replayed)
    parts: dict[Any, Any] = {("logits", None): mine.logits}
    for kind in ("states", "routing"):
        parts |= {(kind, layer): part for layer, part in getattr(mine, kind).items()}
    holders: dict[Any, int] = {}
    for rank, names in enumerate(gather(session.control, [name for name, part in parts.items() if part is not None])):
        for name in names:
            holders.setdefault(name, rank)
    if ("logits", None) not in holders:
        raise RefitError(f"the forward pass of {side.spec.title} gave no rank any logits")
    whole: dict[Any, Any] = {}
    for rank in sorted(set(holders.values())):
        said = [{name: _on_host(parts[name]) for name, holder in holders.items() if holder == rank == session.rank}]
        dist.broadcast_object_list(said, src=rank, group=session.control)
        whole |= said[0]
    states, routing = (
        {layer: part for (kind, layer), part in whole.items() if kind == wanted} for wanted in ("states", "routing")
    )
    return ForwardPass(whole["logits", None], states, routing)


def _on_host(part: Any) -> Any:
    return Routing(part.scores.cpu(), part.chosen.cpu()) if isinstance(part, Routing) else part.cpu()
