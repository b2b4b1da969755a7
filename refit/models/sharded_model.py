"""ShardedModel: the protocol of one live side on this rank, for any framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from refit.memory.weights import LocalWeights
from refit.models.forward_pass import ForwardPass


class Recorder(Protocol):
    """Times named parts of a step. A part may begin and end many times; its times add up."""

    def start(self, name: str) -> None: ...

    def stop(self, name: str) -> None: ...


@contextmanager
def part(recorder: Recorder | None, name: str) -> Iterator[None]:
    """The part `name` of a step runs within this context."""
    if recorder is None:
        yield
        return
    recorder.start(name)
    yield
    recorder.stop(name)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one training step gave on this rank. `loss` is the mean over this replica's tokens, on the ranks that
    compute it; `grad_norm` is the gradients' norm over the whole model, before clipping. `skipped`: gradients of
    float16 overflowed, so that the weights stayed as they were and there is no norm."""

    loss: float | None = None
    grad_norm: float | None = None
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What a live model runs with: the classes of its token dispatchers, joined by "+", and its framework's whole
    configuration as text."""

    dispatcher: str | None = None
    config: dict[str, str] = field(default_factory=dict)


class Trainer(Protocol):
    """Trains one side. `optimizer` is what reports call its optimizer, `vocabulary` says which of embedding, output
    layer and loss are parallel over the vocabulary."""

    optimizer: str
    vocabulary: str

    def weights_changed(self) -> None:
        """Take over weights that were written from outside. Collective: every rank of the side."""
        ...

    def step(self, tokens: torch.Tensor, recorder: Recorder | None = None) -> StepReport:
        """Train on `tokens` `[global_batch_size, seq_length + 1]`, the same on every rank: each takes its replica's.

        The recorder gets the parts `forward`, `backward`, `gradient sync` and `optimizer`, with `forward and backward`
        in place of the first two where they run together, and of routed experts `route`, `dispatch`, `experts` and
        `combine`, each with ` forward` or ` backward` behind it.
        Collective: every rank of the side.
        """
        ...

    def close(self) -> None:
        """End what must not outlive the process groups. No step follows."""
        ...


def vocabulary_text(tp: int, *parallel: str, besides: str = "") -> str:
    """What `Trainer.vocabulary` says: the parts that are `parallel` over `tp` ranks, and `besides`, why others are
    not."""
    if tp == 1:
        return "whole on every rank, TP is 1"
    text = f"split over TP {tp}: {', '.join(parallel)}"
    return f"{text}; {besides}" if besides else text


class ShardedModel(Protocol):
    """What the benchmark needs of a side. A row of `FORMATS` names the function that builds one.

    The builder is collective: every rank of the job, including those outside the side. `weights` states what this rank
    holds. The benchmark compares that with the format's prediction, or gathers it where a model provider builds the
    model and nothing can be predicted.
    """

    @property
    def weights(self) -> LocalWeights | None:
        """Views of this rank's parameters and persistent buffers; None on ranks outside the side."""
        ...

    @property
    def trainer(self) -> Trainer | None:
        """What trains the side; None on ranks outside it and where the scenario does not train this side."""
        ...

    @property
    def settings(self) -> LiveSettings:
        """Empty on ranks outside the side."""
        ...

    def check_forward(self) -> None:
        """Raise UnavailableError, the same on every rank of the side, where no forward pass can run."""
        ...

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        """Run `tokens` `[batch, sequence]` forward in float32, the weights' values as they are; with the states of
        another pass, every layer computes with those (`Trace`).

        Nothing is known on ranks outside the side. Vocabulary padding is removed. Tokens go to the experts that the
        router chooses, also where steps force them. Collective: every rank of the side. Raises RefitError where the
        pass fails.
        """
        ...

    def prepare_infer(self) -> None:
        """Derive what `infer` computes with from the weights as they are now; until they change, once is enough."""
        ...

    def infer(self, tokens: torch.Tensor) -> None:
        """Run `tokens` `[batch, sequence]` forward as a step does, each data-parallel replica its part of the batch.

        Logits stay where they are computed. Collective: every rank of the side.
        """
        ...


class WithoutSteps:
    """The part of a `ShardedModel` that trains and infers, for formats and ranks that do neither."""

    trainer: Trainer | None = None
    settings = LiveSettings()

    def prepare_infer(self) -> None: ...

    def infer(self, tokens: torch.Tensor) -> None: ...


class NotBuilt(WithoutSteps):
    """The `ShardedModel` of a side that no measurement uses: it has nothing."""

    weights: LocalWeights | None = None

    def check_forward(self) -> None: ...

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        return ForwardPass()
