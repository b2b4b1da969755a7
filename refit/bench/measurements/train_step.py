"""The train-step measurement: training steps on the source, then one more with recording on for the breakdown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from refit.bench.clock import Spans
from refit.bench.exchange import gather
from refit.bench.initial_weights import initialise
from refit.bench.measurements.step_run import Work, live_settings, run_recorded, run_steps
from refit.bench.memory import release_cached
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.config.limits import MAX_RANKS
from refit.config.steps import StepSettings
from refit.models.sharded_model import Recorder, StepReport
from refit.predict.flops import train_flops
from refit.report.steps import step_lines
from refit.results.status import Status
from refit.results.step import StepResult


class TrainStepMeasurement:
    """The `Measurement` named `train-step`."""

    def run(self, session: Session, source: Side, destination: Side) -> StepResult:
        scenario = session.scenario
        steps, model = scenario.steps, scenario.model
        assert steps is not None
        assert model is not None
        session.enter("initial weights")
        # Forced balanced routing draws from torch's generators: equal draws in every run, other ones on every rank.
        torch.manual_seed(steps.seed * MAX_RANKS + session.rank)
        trainer = source.model.trainer
        if source.weights is not None and trainer is not None:
            if scenario.source_weights is None:
                with torch.no_grad():
                    initialise(source.weights)
            trainer.weights_changed()

        def prepare(number: int, recorder: Recorder | None = None) -> Callable[[], StepReport]:
            if trainer is None:
                return StepReport
            return functools.partial(trainer.step, tokens_of(steps, number, model.vocab_size), recorder)

        settings = live_settings(session, source.model.settings)
        trainers: list[tuple[str, str] | None] = gather(
            session.control, (trainer.optimizer, trainer.vocabulary) if trainer else None
        )
        optimizer, vocabulary = next(filter(None, trainers))
        result = StepResult(
            optimizer=optimizer,
            vocabulary=vocabulary,
            dispatcher=settings.dispatcher,
            num_ranks=source.spec.world_size,
            num_microbatches=steps.num_microbatches(source.spec.layout.dp),
            sequences_per_step=steps.global_batch_size,
            flops_per_step=train_flops(model, steps.global_batch_size, steps.seq_length),
            config=settings.config,
        )
        session.say(step_lines.train_header(scenario, steps, result))
        work = Work("train step", steps.num_warmup, steps.num_steps, steps.tokens_per_step)
        result = run_steps(session, work, result, prepare, session.publish)
        spans = Spans(session.device)
        step = prepare(steps.num_warmup + steps.num_steps, spans)
        result = replace(result, breakdown=run_recorded(session, work.label, step, spans))
        release_cached(session.device)
        wrong = step_lines.not_finite_line(result)
        return replace(result, status=Status.WRONG_DATA, reason=wrong) if wrong else result


def tokens_of(steps: StepSettings, number: int, vocab_size: int) -> torch.Tensor:
    """Mock tokens of step `number`, `[global_batch_size, seq_length + 1]`: the same on every rank and in every run."""
    generator = torch.Generator().manual_seed(steps.seed + number)
    return torch.randint(vocab_size, (steps.global_batch_size, steps.seq_length + 1), generator=generator)
