"""The log lines of training steps and forward passes, and of the whole cycle with its refit."""

from __future__ import annotations

from refit import units
from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.config.steps import StepSettings
from refit.report.steps.bounds import bound_lines
from refit.report.steps.cycle import cycle_lines
from refit.report.terminal.escaped import plain_lines
from refit.results.result import Result
from refit.results.status import Status
from refit.results.step import ForwardResult, StepResult, StepSample


def train_header(scenario: Scenario, steps: StepSettings, result: StepResult) -> str:
    """The first lines of the training steps, with `#`."""
    routing = "forced balanced" if steps.dispatch.balanced else "the router's own"
    lines = [
        f"train step of {scenario.source.title}: {steps.global_batch_size} sequences of {steps.seq_length} tokens, "
        f"micro-batch {steps.micro_batch_size}, {result.num_microbatches} micro-batches per replica, "
        f"{result.flops_per_step / 1e12:,.4g} TFLOP",
        f"optimizer: {result.optimizer}, lr {steps.lr:g}; initial weights {_initial(scenario)}, mock tokens with seed "
        f"{steps.seed}",
        f"vocabulary: {result.vocabulary}",
    ]
    lines += _precision(scenario.source)
    lines += [f"dispatcher: {result.dispatcher}; routing {routing}"] if result.dispatcher else []
    return plain_lines(f"# {line}" for line in lines)


def _initial(scenario: Scenario) -> str:
    return "drawn by position" if scenario.source_weights is None else f"of {scenario.source_weights}"


def _precision(side: SideSpec) -> list[str]:
    """What a model of transformers computes its attention with, and in which dtypes."""
    if side.attn_impl is None or side.dtype is None:
        return []
    autocast = f", products in {side.autocast.value} (torch.autocast)" if side.autocast is not None else ""
    return [f"attention: {side.attn_impl}; parameters {side.dtype.value}{autocast}"]


def forward_header(scenario: Scenario, result: ForwardResult) -> str:
    """The first line of the forward passes."""
    return (
        f"# forward of {scenario.destination.title}, {_weights(result)}: prefill of a batch, then passes of a "
        "single token per sequence without a KV cache (it attends to itself alone)"
    )


def _weights(result: ForwardResult) -> str:
    return f"{result.weights} weights{', dequantised to BF16 beforehand' if result.dequantised else ''}"


def step_line(label: str, sample: StepSample, number: int, num_warmup: int, num_steps: int) -> str:
    """`train step 3/5: 812.4 ms (slowest rank 2), loss 5.6937`."""
    place = _place(number, num_warmup, num_steps)
    loss = f", loss {sample.loss:.6f}" if sample.loss is not None else ""
    skipped = ", overflow: weights unchanged" if sample.skipped else ""
    wrong = "".join(f", {NUMBERS[name]} {value}" for name, value in sample.not_finite.items())
    return f"{label} {place}: {1e3 * sample.seconds:.2f} ms (slowest rank {sample.slowest_rank}){loss}{wrong}{skipped}"


def _place(number: int, num_warmup: int, num_steps: int) -> str:
    """`warm-up 1/2`, `3/5`: step `number` of all, from 1 on."""
    return f"warm-up {number}/{num_warmup}" if number <= num_warmup else f"{number - num_warmup}/{num_steps}"


NUMBERS = {"loss": "loss", "grad_norm": "gradient norm"}
"""What must be finite in a step that counts: fields of StepSample, and what lines call them."""


def not_finite_line(result: StepResult) -> str | None:
    """`loss of train step 2/5 is nan (4 of 8 steps are not finite): no time of this run counts`, of the first such
    step; None where all losses and gradient norms are finite."""
    num_steps, found = len(result.measured), result.breakdown
    num_warmup = len(result.samples) - num_steps
    steps = {
        f"train step {_place(number, num_warmup, num_steps)}": sample.not_finite
        for number, sample in enumerate(result.samples, start=1)
    }
    steps |= {"the recorded step": found.not_finite} if found is not None else {}
    wrong = {place: values for place, values in steps.items() if values}
    if not wrong:
        return None
    place, values = next(iter(wrong.items()))
    name, value = next(iter(values.items()))
    how_many = f"{len(wrong)} of {len(steps)} steps {'is' if len(wrong) == 1 else 'are'} not finite"
    return f"{NUMBERS[name]} of {place} is {value} ({how_many}): no time of this run counts"


def train_closing_lines(result: StepResult, run: Result) -> list[str]:
    """The last lines on training steps: times, speed, memory, breakdown, and why they are wrong."""
    lines = [*_times("Train step", result), *_breakdown(result)]
    return [*lines, f"FAILED (train step): {result.reason}"] if result.status is Status.WRONG_DATA else lines


def forward_closing_lines(result: ForwardResult, run: Result) -> list[str]:
    """The last lines on forward passes, and on the cycle where the run measured all of it."""
    lines = []
    if result.prefill is not None:
        lines += _times(f"Prefill ({_weights(result)})", result.prefill)
        lines += bound_lines("Prefill", result, result.prefill, run)
    if result.token is not None:
        lines += _times("Single token", result.token)
    return lines


def _times(label: str, result: StepResult) -> list[str]:
    summary = result.summary
    if summary is None:
        return [f"{result.status.value.upper()} ({label}): {result.reason or 'no steps were measured'}"]
    stalls = f", {result.num_stalls} stalls" if result.num_stalls else ""
    stalls += f", {result.num_skipped} of all steps skipped by overflow" if result.num_skipped else ""
    return [
        f"{label}: median {1e3 * summary.median_s:.2f} ms, mean {1e3 * summary.mean_s:.2f}, min "
        f"{1e3 * summary.min_s:.2f}, max {1e3 * summary.max_s:.2f} over {len(result.measured)} steps{stalls}",
        f"{label}: {result.tokens_per_s:,.1f} tokens/s, {result.samples_per_s:,.3f} sequences/s, "
        f"{result.tflops_per_gpu:,.4g} TFLOP/s per rank{_memory(result)}",
    ]


def _memory(result: StepResult) -> str:
    allocated, peak = result.allocated_bytes, result.peak_bytes
    texts = [f"{units.gib(allocated)} in use"] if allocated else []
    texts += [f"peak {units.gib(peak)}"] if peak else []
    return f"; memory of the fullest rank: {', '.join(texts)}" if texts else ""


def _breakdown(result: StepResult) -> list[str]:
    found = result.breakdown
    if found is None:
        return []
    parts = {**found.parts_s, "rest": found.rest_s}
    shares = ", ".join(f"{name} {_share(seconds, found.seconds)}" for name, seconds in parts.items())
    lines = [f"Breakdown of one more step ({1e3 * found.seconds:.2f} ms, rank {found.rank}): {shares}"]
    if found.experts_s:
        inner = ", ".join(f"{name} {_share(seconds, found.seconds)}" for name, seconds in found.experts_s.items())
        lines.append(f"Within forward and backward: {inner}")
    return lines


def _share(seconds: float, whole: float) -> str:
    return f"{1e3 * seconds:.2f} ms ({100 * seconds / whole:.0f} %)" if whole else "-"


def summary_lines(result: Result) -> list[str]:
    """The lines of a sweep's summary on the steps of one scenario, and on the cycle."""
    train, forward = (result.measurements.get(name) for name in ("train-step", "forward"))
    lines = []
    if isinstance(train, StepResult):
        lines += [*_times("Train step", train), *_breakdown(train)]
    if isinstance(forward, ForwardResult):
        lines += forward_closing_lines(forward, result)
    return [*lines, *cycle_lines(result)]
