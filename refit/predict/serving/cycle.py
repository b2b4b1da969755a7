"""A cycle of reinforcement learning on lower bounds: training step, refit, and the decoding and prefill of rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refit.config.clusters import Cluster
from refit.config.routing import UNIFORM, Routing
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.flops import train_flops
from refit.predict.kv_cache import cache_bytes_of_sequence
from refit.predict.serving.layout import Served
from refit.predict.serving.roofline import PassBound, Serving


@dataclass(frozen=True, slots=True)
class Workload:
    """What engines serve, all of them together.

    `batch` sequences decode at a time, with `context` tokens in the cache on average. They begin with a prompt of
    `prompt` tokens, so that each generates 2 x (context - prompt). A cycle decodes `rollout_tokens`, with experts
    chosen as `routing` says, and trains on all that its sequences have become; `train_s` is the training step where it
    is given.
    """

    batch: int
    context: int
    prompt: int
    rollout_tokens: int
    train_s: float | None = None
    routing: Routing = UNIFORM

    @property
    def num_sequences(self) -> float:
        """Sequences of a cycle."""
        return self.rollout_tokens / (2 * (self.context - self.prompt))

    @property
    def most_tokens(self) -> int:
        """Of a sequence that has ended."""
        return 2 * self.context - self.prompt

    def check(self, shape: ModelShape) -> None:
        """Raise UsageError, with both numbers, for sequences that the model has no positions for, or without an answer,
        and for a routing that is none of this model's."""
        most = shape.max_position_embeddings
        if self.context > most:
            raise UsageError(
                f"--context {self.context:,} is beyond the model's {most:,} positions: give {most} or less"
            )
        if self.prompt >= self.context:
            raise UsageError(
                f"--prompt {self.prompt:,} leaves nothing to generate of --context {self.context:,}, the tokens of a "
                f"sequence on average: give {self.context - 1} or less"
            )
        if self.most_tokens > most:
            raise UsageError(
                f"sequences of --context {self.context:,} on average and --prompt {self.prompt:,} end with "
                f"{self.most_tokens:,} tokens, beyond the model's {most:,} positions: lower --context to "
                f"{(most + self.prompt) // 2}"
            )
        if shape.experts is not None:
            self.routing.probabilities(shape.experts)

    def train_bound_s(self, shape: ModelShape, num_gpus: int, cluster: Cluster) -> float:
        """The training step as given, or its operations at the full speed of `num_gpus`."""
        if self.train_s is not None:
            return self.train_s
        assert cluster.bf16_flops_per_s is not None
        tokens = self.num_sequences * self.most_tokens
        return tokens * train_flops(shape, 1, self.most_tokens) / self.most_tokens / num_gpus / cluster.bf16_flops_per_s


@dataclass(frozen=True, slots=True)
class Cycle:
    """Lower bounds of the parts of a cycle, in seconds."""

    train_s: float
    refit_s: float
    decode_s: float
    prefill_s: float

    @property
    def seconds(self) -> float:
        return self.train_s + self.refit_s + self.decode_s + self.prefill_s

    @property
    def parts(self) -> dict[str, float]:
        return {"training": self.train_s, "refit": self.refit_s, "decoding": self.decode_s, "prefill": self.prefill_s}

    @property
    def largest(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Bounds of a layout: of one decode step of `workload`, and of the prefill of a cycle's prompts."""

    workload: Workload
    decode: PassBound
    prefill: PassBound
    replicas: int

    @property
    def decode_s(self) -> float:
        """Of all steps of a cycle."""
        return self.workload.rollout_tokens / self.workload.batch * self.decode.seconds

    @property
    def tokens_per_s(self) -> float:
        """Decoded by all engines."""
        return self.workload.batch / self.decode.seconds

    @property
    def sequences(self) -> int:
        """Of the busiest replica."""
        return math.ceil(self.workload.batch / self.replicas)

    def cycle(self, train_s: float, refit_s: float) -> Cycle:
        return Cycle(train_s, refit_s, self.decode_s, self.prefill.seconds)


def rollouts(shape: ModelShape, side: SideSpec, served: Served, cluster: Cluster, workload: Workload) -> Rollouts:
    """The bounds of `workload` on `side`, whose sizes are `served`. The cluster has what they need (`check_serves`)."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    serving = Serving(shape, side.dtype, served, cluster, workload.routing)
    decode = serving.decode(math.ceil(workload.batch / served.replicas), workload.context)
    prefill = serving.prefill(workload.num_sequences / served.replicas, workload.prompt)
    return Rollouts(workload, decode, prefill, served.replicas)


def largest_batch(shape: ModelShape, side: SideSpec, served: Served, room_bytes: int, context: int) -> int:
    """The most sequences of `context` tokens whose cache fits `room_bytes` of each GPU, on all engines together."""
    return max(0, room_bytes // cache_bytes_of_sequence(shape, side.layout, context)) * served.replicas
