"""StepSettings: what a training step and a forward pass compute, and how routed experts exchange tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

LOSS_SCALE_WINDOW = 1000
"""Steps without overflow after which the loss scale of float16 is doubled. Each overflow halves it."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """Megatron's activation recomputation."""

    granularity: str | None = None
    """None (none), `selective` (of `modules`) or `full`."""
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How tokens reach their experts."""

    dispatcher: str = "allgather"
    """`allgather`, `alltoall` or `flex`."""
    backend: str | None = None
    """That of flex."""
    overlap: bool = False
    """Hides the exchange behind the computation of another micro-batch."""
    delay_wgrad: bool = False
    """Moves weight gradients behind it."""
    balanced: bool = False
    """Draws the experts of a token at random, so that all get equally many."""
    router_dtype: str | None = None
    """Of the router's arithmetic; None for the parameters'."""
    rank_capacity: float | None = None
    """What flex/ncclep has room for on a rank, over its tokens x top-k."""

    @property
    def arm(self) -> str:
        """`alltoall`, `flex/deepep`."""
        return f"{self.dispatcher}/{self.backend}" if self.backend else self.dispatcher


@dataclass(frozen=True, slots=True)
class StepSettings:
    """One training step."""

    micro_batch_size: int
    """Sequences computed at a time on a replica."""
    global_batch_size: int
    """Sequences of a step."""
    seq_length: int
    """Tokens of a sequence."""
    num_warmup: int = 2
    """Steps before the measured ones."""
    num_steps: int = 5
    """Measured steps."""
    lr: float = 1e-4
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    seed: int = 1234
    """With it tokens are drawn."""
    initial_loss_scale: float = 65536.0
    """What the loss is multiplied by in float16, before overflows and `LOSS_SCALE_WINDOW` change it."""
    sequence_parallel: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    dispatch: Dispatch = field(default_factory=Dispatch)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    @property
    def forward_only(self) -> StepSettings:
        """The same without what only a backward pass has."""
        dispatch = replace(self.dispatch, overlap=False, delay_wgrad=False)
        return replace(self, recompute=Recompute(), sequence_parallel=False, dispatch=dispatch)

    def num_microbatches(self, dp: int) -> int:
        """Micro-batches that each of `dp` data-parallel replicas computes in a step, one after the other."""
        return self.global_batch_size // (self.micro_batch_size * dp)
