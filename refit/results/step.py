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
    """One step. Memory is that of the fullest rank."""

    step: int
    warmup: bool
    """Summaries leave it out."""
    seconds_per_rank: tuple[float, ...]
    """Of every rank of the job, in rank order."""
    slowest_rank: int
    num_tokens: int
    """Of the whole step."""
    loss: float | None = None
    """Mean over the step's tokens; None for a forward pass."""
    grad_norm: float | None = None
    """Before clipping; None for a forward pass."""
    skipped: bool = False
    """Gradients overflowed: weights stayed as they were, and there is no norm."""
    not_finite: dict[str, str] = field(default_factory=dict)
    """A `loss` or `grad_norm` that is no number, as text (`nan`, `inf`, `-inf`), since JSON has none for it. That field
    is then None."""
    allocated_bytes: int | None = None
    """After the step."""
    peak_bytes: int | None = None
    """Of all steps so far."""

    @property
    def seconds(self) -> float:
        return max(self.seconds_per_rank)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """One more step with recording on, on its slowest rank."""

    seconds: float
    rank: int
    """The slowest."""
    parts_s: dict[str, float] = field(default_factory=dict)
    """`forward`, `backward` (or both together), `gradient sync`, `optimizer`: those that it has."""
    rest_s: float = 0.0
    """With the parts it adds up to `seconds`."""
    experts_s: dict[str, float] = field(default_factory=dict)
    """Phases of forward and backward (`dispatch forward`, ...), summed over layers and micro-batches, on the rank where
    they take longest. Beside a part of both together they run on several streams, and their times overlap."""
    not_finite: dict[str, str] = field(default_factory=dict)
    """As of a step."""

    def share(self, part: str) -> float:
        """The part's share of the step, 0 to 1."""
        return self.parts_s.get(part, 0.0) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Steps of one side. Memory is per rank of the job; None where it is not known."""

    status: Status = Status.RUNNING
    reason: str | None = None
    """Why it was waived, or why its data are wrong: a loss that is not finite."""
    optimizer: str | None = None
    """The class that ran."""
    vocabulary: str | None = None
    """What is split over the vocabulary; None for a forward pass."""
    dispatcher: str | None = None
    """The class that ran; None without experts."""
    num_ranks: int = 0
    num_microbatches: int = 0
    sequences_per_step: int = 0
    flops_per_step: float = 0.0
    """Of all ranks (`refit/predict/flops.py`)."""
    config: dict[str, str] = field(default_factory=dict)
    """The framework's own configuration, whole."""
    samples: tuple[StepSample, ...] = ()
    summary: Summary | None = None
    breakdown: Breakdown | None = None
    allocated_bytes_per_rank: tuple[int | None, ...] = ()
    """After the last step."""
    peak_bytes_per_rank: tuple[int | None, ...] = ()
    """Of all steps."""

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
    """Forward passes of the destination."""

    status: Status = Status.RUNNING
    reason: str | None = None
    weights: str = "initial"
    """`trained` (refitted after training), `loaded` (those of a checkpoint) or `initial`."""
    dequantised: bool = False
    """The destination holds FP8, and passes run on its codes times its scales, in BF16."""
    prefill: StepResult | None = None
    """A batch."""
    token: StepResult | None = None
    """One token per sequence. There is no KV cache: it attends to itself alone."""


def count_stalls(seconds: Sequence[float]) -> int:
    """Times above STALL times their median."""
    return sum(each > STALL * statistics.median(seconds) for each in seconds)
