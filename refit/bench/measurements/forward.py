"""The forward measurement: prefill of a batch and passes of a single token, on the destination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from refit.bench.initial_weights import initialise
from refit.bench.measurements.step_run import Work, live_settings, run_steps
from refit.bench.measurements.train_step import tokens_of
from refit.bench.oracle import part_of
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.models.sharded_model import StepReport
from refit.predict.flops import forward_flops
from refit.report.steps import step_lines
from refit.results.status import worst
from refit.results.step import ForwardResult, StepResult


class ForwardMeasurement:
    """The `Measurement` named `forward`."""

    def run(self, session: Session, source: Side, destination: Side) -> ForwardResult:
        with torch.no_grad():
            return _measure(session, destination)


def _measure(session: Session, side: Side) -> ForwardResult:
    steps, measurements = session.scenario.steps, session.scenario.measurements
    assert steps is not None
    trained = {"train-step", "refit"} <= set(measurements)
    loaded = session.scenario.source_weights is not None and "refit" in measurements
    if not trained and not loaded and side.weights is not None:
        session.enter("initial weights")
        initialise(side.weights, part_of(session.scenario))
    session.enter("prepare forward passes")
    side.model.prepare_infer()
    dequantised = side.spec.quantisation is not None
    weights = "trained" if trained else "loaded" if loaded else "initial"
    result = ForwardResult(weights=weights, dequantised=dequantised)
    session.say(step_lines.forward_header(session.scenario, result))

    def keep_prefill(found: StepResult) -> None:
        session.publish(replace(result, prefill=found))

    def keep_token(found: StepResult) -> None:
        session.publish(replace(result, token=found))

    result = replace(result, prefill=_passes(session, side, "prefill", steps.seq_length, keep_prefill))
    result = replace(result, token=_passes(session, side, "token", 1, keep_token))
    return replace(result, status=worst([each.status for each in (result.prefill, result.token) if each is not None]))


def _passes(session: Session, side: Side, name: str, length: int, publish: Callable[[StepResult], None]) -> StepResult:
    """Passes over sequences of `length` tokens, a micro-batch on each replica."""
    steps, model = session.scenario.steps, session.scenario.model
    assert steps is not None
    assert model is not None
    num_sequences = steps.micro_batch_size * side.spec.layout.dp
    settings = live_settings(session, side.model.settings)
    result = StepResult(
        dispatcher=settings.dispatcher,
        num_ranks=side.spec.world_size,
        num_microbatches=1,
        sequences_per_step=num_sequences,
        flops_per_step=forward_flops(model, num_sequences, length),
        config=settings.config,
    )
    wanted = replace(steps, global_batch_size=num_sequences, seq_length=length)

    def prepare(number: int) -> Callable[[], StepReport]:
        tokens = tokens_of(wanted, number, model.vocab_size)[:, :-1]

        def run() -> StepReport:
            side.model.infer(tokens)
            return StepReport()

        return run

    work = Work(f"forward, {name}", steps.num_warmup, steps.num_steps, num_sequences * length)
    return run_steps(session, work, result, prepare, publish)
