"""Measures one engine: connect and prepare once, then per iteration fill, poison, time one refit and check."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from refit.bench import oracle
from refit.bench.clock import Stopwatch, Timing, time_run
from refit.bench.engines.base import RefitEngine
from refit.bench.exchange import gather
from refit.bench.forward_check import compare_forward
from refit.bench.measurements.rank_samples import Asked, RankSample, sample_of, wrong_weights
from refit.bench.memory import PeakMemory, past_torch
from refit.bench.profile import profiled
from refit.bench.reference import Reference
from refit.bench.served import served_by
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.bench.training import Training
from refit.bench.written import write_destination
from refit.config.registry import ENGINES
from refit.config.scenario import Verify
from refit.errors import RefitError, UnavailableError
from refit.memory.rows import Rows
from refit.memory.weights import LocalShard
from refit.plan.cost import Bound
from refit.plan.sharding import Sharding
from refit.predict.sides import PlannedSides
from refit.report.refits import checkpoint_lines, refit_lines
from refit.report.refits.forward_line import forward_line
from refit.report.refits.progress import Progress
from refit.report.refits.served_lines import served_line
from refit.results.delta import Changed
from refit.results.refit import EngineResult, ForwardCheck, NotMoved
from refit.results.stats import stability, summarise
from refit.results.status import Status
from refit.transport.base import Connected, Program

MAX_KEYS = 8
"""Most keys of tensors that were not moved that a result names per reason. Their number is always complete."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why an engine was not measured."""

    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class PlannedRefit:
    """Two sides and the plan between them. `plan_s` is the time that planning took here.

    `training` is that of the source, None where it was not trained. `training_doubt` is why it gave wrong data, None
    where it did not.
    """

    source: Side
    destination: Side
    sides: PlannedSides
    bound: Bound | None
    plan_s: float
    training: Training | None = None
    training_doubt: str | None = None


class EngineRun:
    """Measures one engine on one plan. `keep` is called with every update of the EngineResult.

    With `reference`, which is collective, each refit is one of what an optimizer step has left, and is compared with a
    full one. Without, it is one of what the oracle fills in. One that `writes` leaves what it has moved as a
    checkpoint.
    """

    def __init__(
        self,
        session: Session,
        planned: PlannedRefit,
        name: str,
        engine: RefitEngine,
        keep: Callable[[EngineResult], None],
        reference: Callable[[], Reference] | None = None,
        writes: bool = False,
    ) -> None:
        self._session = session
        self._scenario = session.scenario
        self._planned = planned
        self._packs = planned.sides.max_bytes is not None
        self._oracle = oracle.part_of(session.scenario)
        self._name = name
        self._engine = engine
        self._keep = keep
        self._make_reference = reference
        self._writes = writes
        self._reference: Reference | None = None
        self._result = EngineResult(transport=engine.transport)
        self._not_moved: Mapping[str, str] = {}
        self._serving = served_by(session, planned.source, planned.destination, ENGINES[name])
        self._stopwatch = Stopwatch()
        if engine.uses_plan:
            self._stopwatch.seconds["plan"] = planned.plan_s

    def measure(self) -> None:
        """Connect, prepare, iterate and summarise. An engine that needs something missing here is waived.

        A baseline that raises an error is recorded as failed; an error of any other engine is raised.

        Collective: every rank of the job.
        """
        if self._make_reference is not None and self._scenario.verify is not Verify.OFF:
            self._session.enter(f"prepare full refits beside {self._name}")
            self._reference = self._make_reference()
        memory = self._connected()
        if memory is None:
            return
        program = self._prepared(memory)
        if program is None:
            return
        self._leave_out(self._engine.not_moved())
        if not self._iterate(program, memory):
            return
        gathered = self._gathered
        self._update(
            extra_memory_bytes_per_rank=self._session.on_gpus(gathered(memory.extra_bytes)),
            staging_bytes_per_rank=gathered(program.staging_bytes),
        )
        self._summarise()
        self._update(served=self._serving.result(self._result.samples))
        if not self._scenario.trains("source"):
            self._write()
        self._check_forward(program)
        self._profile(program)
        self._move_trained(program)
        if self._scenario.trains("source"):
            self._write()
        self._session.enter(f"close {self._name}")
        program.close()
        if self._reference is not None:
            self._reference.close()

    def _connected(self) -> PeakMemory | None:
        """Connect. Return a memory watch that starts after connecting; None where the engine cannot run."""
        session = self._session
        session.enter(f"connect {self._name}")
        session.start.enter("connect")
        before = past_torch(session.device)
        connected: list[Connected | None] = []
        with self._stopwatch.step("connect"):
            refusal = self._attempt(lambda: connected.append(self._engine.connect(self._planned.sides, session.ranks)))
        if self._is_refused(refusal):
            return None
        found = connected[0] or Connected()
        self._update(
            connected=found.words,
            slow=found.slow,
            connect_memory_bytes_per_rank=self._gathered(past_torch(session.device) - before),
        )
        return PeakMemory(session.device, is_shared=session.is_gpu_shared)

    def _prepared(self, memory: PeakMemory) -> Program | None:
        """Prepare and return the program; None where the engine cannot run."""
        self._session.enter(f"prepare {self._name}")
        self._session.start.enter("prepare")
        made: list[Program] = []
        planned = self._planned

        def prepare() -> None:
            made.append(self._engine.prepare(planned.sides, planned.source, planned.destination))

        with memory.watch(), self._stopwatch.step("prepare"):
            refusal = self._attempt(prepare)
        return None if self._is_refused(refusal) else made[0]

    def _attempt(self, action: Callable[[], None]) -> _Refusal | None:
        """Run `action`. Return why the engine cannot run: something is missing, or a baseline raised an error."""
        try:
            action()
        except UnavailableError as error:
            return _Refusal(Status.WAIVED, str(error))
        except RefitError as error:
            if not ENGINES[self._name].is_baseline:
                raise
            return _Refusal(Status.FAILED, str(error))
        return None

    def _is_refused(self, refusal: _Refusal | None) -> bool:
        """Whether any rank has a refusal, which is then recorded. Collective: every rank of the job."""
        refused = next((each for each in gather(self._session.control, refusal) if each is not None), None)
        if refused is not None:
            self._update(status=refused.status, reason=refused.reason)
        return refused is not None

    def _leave_out(self, not_moved: Mapping[str, str]) -> None:
        """Record the tensors that are not moved. They are not compared."""
        self._not_moved = not_moved
        destination = self._planned.destination.sharding
        keys: dict[str, list[str]] = defaultdict(list)
        for key, reason in not_moved.items():
            keys[reason].append(key)
        self._update(not_moved=tuple(_left_out(reason, keys[reason], destination) for reason in keys))

    def _iterate(self, program: Program, memory: PeakMemory) -> bool:
        """Whether all refits ran; False where a baseline failed, which is then recorded."""
        scenario, session = self._scenario, self._session
        progress = Progress(self._name, scenario)
        while not self._is_enough():
            iteration = len(self._result.samples)
            shown = progress.now(iteration)
            session.enter(f"{self._name} iteration {iteration + 1}: fill", shown)
            session.start.enter("fill")
            changed = self._fill(iteration)
            label = f"{self._name} iteration {iteration + 1}"
            apart = self._serving.convert(label, program)
            around = self._serving.begin(label)
            self._poison(is_first=iteration == 0)
            session.enter(f"{label}: move", shown)
            session.start.enter("first refit")
            timings: list[Timing] = []
            with memory.watch():
                refusal = self._attempt(partial(self._time, program, timings))
            session.start.stop()
            around |= self._serving.finish(label)
            session.enter(f"{label}: check", shown)
            mine = refusal or RankSample(
                session.rank,
                timings[0],
                self._check(iteration),
                around,
                self._serving.verify(self._scenario.verify),
                apart,
                changed,
            )
            answers: list[RankSample | _Refusal] = gather(session.control, mine)
            if refused := next((each for each in answers if isinstance(each, _Refusal)), None):
                self._update(status=refused.status, reason=refused.reason)
                return False
            ranks = [each for each in answers if isinstance(each, RankSample)]
            warmup = iteration < scenario.num_warmup
            sample = sample_of(ranks, iteration, warmup=warmup, packs=self._packs, asked=self._asked(iteration))
            self._update(
                samples=(*self._result.samples, sample), wrong=(*self._result.wrong, *wrong_weights(ranks, iteration))
            )
            session.say(progress.line(sample))
        return True

    def _fill(self, iteration: int) -> dict[str, Changed]:
        """Give the source the weights of a refit. Returns what an optimizer step has changed of them on this rank."""
        training = self._planned.training if self._scenario.sends_steps else None
        if training is None:
            if self._planned.source.weights is not None and not self._is_loaded:
                oracle.fill(self._planned.source.weights, iteration, self._oracle)
            return {}
        if iteration == 0:
            training.saved.restore()
            return {}
        return training.step()

    @property
    def _is_loaded(self) -> bool:
        """Whether the source holds a checkpoint, of which no refit changes anything: it was filled once, before."""
        return self._oracle.is_real and not self._oracle.keeps_base

    def _asked(self, iteration: int) -> Asked | None:
        delta = self._scenario.delta
        if delta is None:
            return None
        return Asked(delta.share_of(iteration) if iteration and not self._scenario.sends_steps else None)

    def _poison(self, is_first: bool = False) -> None:
        """Unless a refit builds on what the one before has left."""
        weights = self._planned.destination.weights
        if weights is not None and (is_first or not self._oracle.keeps_base):
            oracle.poison(weights)

    def _time(self, program: Program, timings: list[Timing]) -> None:
        timings.append(time_run(program, self._session.control, self._session.device))

    def _is_enough(self) -> bool:
        """Whether no refit is left to time. All ranks hold the times of all ranks, so all decide alike."""
        num_timed, scenario = self._result.num_timed, self._scenario
        if scenario.max_iterations is None or num_timed < scenario.num_iterations:
            return num_timed == scenario.num_iterations
        return num_timed == scenario.max_iterations or stability(self._result.measured_s).is_stable

    def _check(self, iteration: int) -> oracle.Verdict:
        if self._reference is not None:
            return self._reference.check(self._not_moved)
        weights, verify = self._planned.destination.weights, self._scenario.verify
        if weights is None or verify is Verify.OFF:
            return oracle.Verdict(0, ())
        moved = (shard for shard in weights if shard.tensor.key not in self._not_moved)
        tensors, sample = self._planned.source.sharding.tensors, verify is Verify.SAMPLE
        return oracle.check(moved, tensors, iteration, sample=sample, part=self._oracle)

    def _summarise(self) -> None:
        result = self._result
        slowest = {name: max(self._gathered(seconds)) for name, seconds in self._stopwatch.seconds.items()}
        summary = summarise(result.measured_s)
        busiest, bound = self._planned.sides.cost.busiest.nbytes, self._planned.bound
        if self._not_moved or self._packs:  # the plan's bytes are not those that were moved
            busiest, bound = 0, None
        self._update(
            status=Status.OK,
            connect_s=slowest.pop("connect"),
            cold_s={**slowest, "first": result.samples[0].seconds},
            summary=summary,
            stability=stability(result.measured_s) if self._scenario.max_iterations else None,
            bottleneck_gb_per_s=busiest / summary.median_s / 1e9 if busiest else None,
            share_of_lower_bound=bound.seconds / summary.median_s if bound else None,
        )

    def _check_forward(self, program: Program) -> None:
        if not self._scenario.check_forward:
            return
        if self._result.served is not None:
            served = replace(self._result.served, check=self._serving.check(self._name, program))
            self._update(served=served)
            self._session.say(served_line(self._name, served))
            return
        self._session.enter(f"forward after {self._name}")
        if self._not_moved:
            forward = ForwardCheck(passed=True, skipped=f"{len(self._not_moved)} tensors were not moved")
        else:
            forward = compare_forward(self._session, self._planned.source, self._planned.destination)
        self._update(forward=forward)
        self._session.say(forward_line(self._name, forward))

    def _move_trained(self, program: Program) -> None:
        """Refit the weights that training left, and compare the logits. Both sides then hold these weights.

        After wrong training nothing is compared: NaN agrees with nothing, and the refit is not to blame.
        """
        training, destination, doubt = self._planned.training, self._planned.destination, self._planned.training_doubt
        if training is None:
            return
        label = f"refit of the trained weights with {self._name}"
        training.saved.restore()
        self._serving.convert(label, program)
        self._serving.begin(label)
        self._session.enter(f"{label}: move")
        self._poison()
        time_run(program, self._session.control, self._session.device)
        self._serving.finish(label)
        skipped = ForwardCheck(passed=True, skipped=doubt) if doubt else None
        forward = skipped or compare_forward(self._session, self._planned.source, destination)
        self._update(trained=forward)
        self._session.say(forward_line(self._name, forward, "trained weights"))

    def _write(self) -> None:
        """Write what the destination holds: what the last refit moved, or the weights that training left."""
        if not self._writes:
            return
        planned, scenario, last = self._planned, self._scenario, len(self._result.samples) - 1
        source, part = planned.source.sharding.tensors, self._oracle
        # Of trained weights, and of codes and scales, the refit's own check says whether they are right.
        as_held = scenario.trains("source") or scenario.destination.quantisation is not None

        def expected(shard: LocalShard, block: Rows) -> torch.Tensor:
            if as_held:
                return block.data
            return part.values(source[shard.tensor.key], block, last).to(block.data.dtype)

        what = "what the destination holds" if as_held else scenario.filled_with
        compared_with = None if scenario.verify is Verify.OFF else what
        written = write_destination(self._session, planned.destination, compared_with, expected)
        self._update(written=written)
        self._session.say(checkpoint_lines.written(written))

    def _profile(self, program: Program) -> None:
        if not self._scenario.profile:
            return
        self._session.enter(f"profile {self._name}")
        self._update(profile=self._gathered(tuple(profiled(program.run))))
        self._session.say(refit_lines.profile_table(self._name, self._result))

    def _update(self, **changes: Any) -> None:
        changed = replace(self._result, **changes)
        self._result = replace(changed, status=changed.verdict) if changed.status is Status.OK else changed
        self._keep(self._result)

    def _gathered(self, mine: Any) -> tuple[Any, ...]:
        return tuple(gather(self._session.control, mine))


def _left_out(reason: str, keys: Sequence[str], destination: Sharding) -> NotMoved:
    held = [int(destination.by_key[key].boxes.volumes[destination.by_key[key].holders.box].sum()) for key in keys]
    nbytes = sum(volume * destination.tensors[key].itemsize for key, volume in zip(keys, held, strict=True))
    return NotMoved(reason, len(keys), sum(held), nbytes, tuple(keys[:MAX_KEYS]))
