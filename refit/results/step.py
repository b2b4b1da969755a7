"""The result types of the train-step and forward measurements, as result files hold them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from refit.results.stats import Summary
from refit.results.status import Status

STEPS_SUFFIX = "_steps.json"
"""Of a run's steps as other benchmarks write them (`report.step_document`), beside result files but none of them."""

STALL = 3.0
"""A step that takes more than this many times the median is a stall."""

COMBINED = "forward and backward"
"""The part of a schedule that computes both together, of different micro-batches. It has neither of them alone."""

STEP_PARTS = ("forward", "backward", COMBINED, "gradient sync", "optimizer")
"""Parts of a recorded step, in the order in which reports have them. What no part has is the rest."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step: seconds of every rank of the job, in rank order. Summaries leave `warmup` samples out.

    `loss` is the mean over the step's tokens, `grad_norm` that before clipping; both None for a forward pass.
    `skipped`: gradients overflowed, so that weights stayed as they were and there is no norm. `not_finite` has a `loss`
    or `grad_norm` that is no number, as text, since JSON has none for it: `nan`, `inf` or `-inf`. That field is then
    None. `num_tokens` are those of the whole step. Memory is that of the fullest rank, as in `StepResult`.
    """

    step: int
    warmup: bool
    seconds_per_rank: tuple[float, ...]
    slowest_rank: int
    num_tokens: int
    loss: float | None = None
    grad_norm: float | None = None
    skipped: bool = False
    not_finite: dict[str, str] = field(default_factory=dict)
    allocated_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        return max(self.seconds_per_rank)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds of one more step with recording on, on its slowest rank. `parts_s`, those of STEP_PARTS that it has, and
    `rest_s` add up to `seconds`.

    `experts_s` are phases of forward and backward, summed over layers and micro-batches, on the rank where they take
    longest: `dispatch forward`, ... Beside COMBINED they run on several streams, and their times overlap. `not_finite`
    is that of `StepSample`.
    """

    seconds: float
    rank: int
    parts_s: dict[str, float] = field(default_factory=dict)
    rest_s: float = 0.0
    experts_s: dict[str, float] = field(default_factory=dict)
    not_finite: dict[str, str] = field(default_factory=dict)

    def share(self, part: str) -> float:
        """The part's share of the step, 0 to 1."""
        return self.parts_s.get(part, 0.0) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Steps of one side. `reason` is why it was waived, or why its data are wrong: a loss that is not finite.

    `optimizer` and `dispatcher` name the classes that ran; `dispatcher` is None without experts. `vocabulary` says what
    is parallel over the vocabulary, None for a forward pass. `config` is the
    framework's own configuration, printed whole. `flops_per_step` are those of all ranks (docs/method.md).
    Memory is in bytes per rank of the job: after the last step and at the peak of all steps; None where not known.
    """

    status: Status = Status.RUNNING
    reason: str | None = None
    optimizer: str | None = None
    vocabulary: str | None = None
    dispatcher: str | None = None
    num_ranks: int = 0
    num_microbatches: int = 0
    sequences_per_step: int = 0
    flops_per_step: float = 0.0
    config: dict[str, str] = field(default_factory=dict)
    samples: tuple[StepSample, ...] = ()
    summary: Summary | None = None
    breakdown: Breakdown | None = None
    allocated_bytes_per_rank: tuple[int | None, ...] = ()
    peak_bytes_per_rank: tuple[int | None, ...] = ()

    @property
    def measured(self) -> list[StepSample]:
        return [sample for sample in self.samples if not sample.warmup]

    @property
    def losses(self) -> list[float]:
        """The loss of every step, warm-up included: its curve."""
        return [sample.loss for sample in self.samples if sample.loss is not None]

    @property
    def median_s(self) -> float | None:
        return self.summary.median_s if self.summary else None

    @property
    def num_skipped(self) -> int:
        """Steps, warm-up included, that changed no weights, as gradients overflowed."""
        return sum(sample.skipped for sample in self.samples)

    @property
    def num_stalls(self) -> int:
        return count_stalls([sample.seconds for sample in self.measured])

    @property
    def tokens_per_s(self) -> float | None:
        tokens = self.samples[-1].num_tokens if self.samples else 0
        return tokens / self.median_s if self.median_s else None

    @property
    def samples_per_s(self) -> float | None:
        """Sequences per second."""
        return self.sequences_per_step / self.median_s if self.median_s else None

    @property
    def tflops_per_gpu(self) -> float | None:
        return self.flops_per_step / self.median_s / self.num_ranks / 1e12 if self.median_s and self.num_ranks else None

    @property
    def peak_bytes(self) -> int | None:
        return max((nbytes for nbytes in self.peak_bytes_per_rank if nbytes is not None), default=None)

    @property
    def allocated_bytes(self) -> int | None:
        return max((nbytes for nbytes in self.allocated_bytes_per_rank if nbytes is not None), default=None)


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Forward passes of the destination: `prefill` of a batch, and `token`, a single token per sequence.

    There is no KV cache: the single token attends to itself alone. `weights` are `trained`, refitted after training,
    `loaded` (those of a checkpoint) or `initial`. `dequantised`: the destination holds FP8, and passes run on its codes
    times its scales, in BF16.
    """

    status: Status = Status.RUNNING
    reason: str | None = None
    weights: str = "initial"
    dequantised: bool = False
    prefill: StepResult | None = None
    token: StepResult | None = None


def count_stalls(seconds: Sequence[float]) -> int:
    """Times above STALL times their median."""
    return sum(each > STALL * statistics.median(seconds) for each in seconds)
