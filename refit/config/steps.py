"""StepSettings: what a training step and a forward pass compute, and how routed experts exchange tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

LOSS_SCALE_WINDOW = 1000
"""Steps without overflow after which the loss scale of float16 is doubled. Each overflow halves it."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """Megatron's activation recomputation. `granularity` is None (none), `selective` (of `modules`) or `full`."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How tokens reach their experts. `dispatcher` is allgather, alltoall or flex, `backend` that of flex.

    `overlap` hides the exchange behind the computation of another micro-batch, `delay_wgrad` moves weight gradients
    behind it. `balanced` draws the experts of a token at random, so that all get equally many. `router_dtype` is that
    of the router's arithmetic, None for the parameters'. `rank_capacity` is what flex/ncclep has room for on a rank,
    over its tokens x top-k.
    """

    dispatcher: str = "allgather"
    backend: str | None = None
    overlap: bool = False
    delay_wgrad: bool = False
    balanced: bool = False
    router_dtype: str | None = None
    rank_capacity: float | None = None

    @property
    def arm(self) -> str:
        """`alltoall`, `flex/deepep`."""
        return f"{self.dispatcher}/{self.backend}" if self.backend else self.dispatcher


@dataclass(frozen=True, slots=True)
class StepSettings:
    """One training step: `global_batch_size` sequences of `seq_length` tokens, `micro_batch_size` of them at a time.

    `num_warmup` steps come before the `num_steps` measured ones. Tokens are drawn with `seed`. `initial_loss_scale` is
    what the loss is multiplied by in float16, before overflows and LOSS_SCALE_WINDOW change it.
    """

    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    num_warmup: int = 2
    num_steps: int = 5
    lr: float = 1e-4
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    seed: int = 1234
    initial_loss_scale: float = 65536.0
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
