"""Training steps give the same losses and the same weights in every layout and with every dispatcher."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import combined_1f1b

from refit.bench.clock import Spans
from refit.bench.initial_weights import initialise
from refit.config.layout import Layout
from refit.config.shape import Dtype, ModelShape
from refit.config.steps import Dispatch, Recompute, StepSettings
from refit.errors import RefitError
from refit.models.megatron import training
from refit.models.megatron.build import BuiltModel, build_model
from refit.models.megatron.dispatchers import check_live, live_dispatcher
from refit.models.megatron.forward import forward_pass
from refit.models.megatron.groups import build_groups
from refit.models.megatron.sharding import read_weights
from refit.models.megatron.training import MegatronTrainer
from tests.models.megatron.small import DENSE, LATENT, MOE, layout, spec, written
from tests.ranks.pool import RankPool

STEPS = StepSettings(micro_batch_size=1, global_batch_size=8, seq_length=12, lr=1e-2)
NUM_STEPS = 3


def built(shape: ModelShape, where: Layout, steps: StepSettings, dtype: Dtype = Dtype.FP32) -> BuiltModel | None:
    steps = replace(steps, sequence_parallel=where.tp > 1)
    return build_model(shape, spec(where, dtype), build_groups(where, shape), device="cpu", steps=steps)


def trained(rank: int, shape: ModelShape, cases: list[tuple[Layout, StepSettings]], dtype: Dtype) -> list[Any]:
    """For each layout: this rank's losses, gradient norms and logits after the last step."""
    found: list[Any] = []
    for where, steps in cases:
        model = built(shape, where, steps, dtype)
        if model is None:
            found.append(None)
            continue
        trainer = MegatronTrainer(model, replace(steps, sequence_parallel=where.tp > 1))
        initialise(read_weights(model))
        trainer.weights_changed()
        reports = [trainer.step(tokens(number)) for number in range(NUM_STEPS)]
        logits = forward_pass(model, tokens(0)[:1, :12]).logits
        found.append(([each.loss for each in reports], [each.grad_norm for each in reports], logits))
    return found


def tokens(number: int) -> torch.Tensor:
    return torch.randint(250, (8, 13), generator=torch.Generator().manual_seed(number))


def with_dispatcher(name: str) -> StepSettings:
    return replace(STEPS, dispatch=Dispatch(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "cases"),
    [
        (
            MOE,
            [
                (layout(), STEPS),
                (layout(ep=2), with_dispatcher("alltoall")),
                (layout(ep=2, pp=2, world=8), with_dispatcher("alltoall")),
                (layout(pp=2, vpp=2, ep=2, first=2), STEPS),
                (layout(tp=2, ep=2, world=4), with_dispatcher("alltoall")),
                (layout(ep=2), replace(STEPS, recompute=Recompute("full", "uniform", 1))),
                (layout(ep=2), replace(STEPS, recompute=Recompute("selective", modules=("core_attn", "moe")))),
            ],
        ),
        (LATENT, [(layout(), STEPS), (layout(tp=2, ep=2, etp=2), STEPS), (layout(ep=4, pp=2), STEPS)]),
        (DENSE, [(layout(), STEPS), (layout(tp=2, pp=2), STEPS), (layout(world=4), STEPS)]),
        (replace(MOE, mtp_num_layers=1), [(layout(), STEPS), (layout(ep=2, pp=2), with_dispatcher("alltoall"))]),
        (
            replace(MOE, mtp_num_layers=1),
            [(layout(), STEPS), (written("Et|tttm|L"), STEPS), (written("E|tttt|m|L", tp=2), STEPS)],
        ),
    ],
    ids=["experts", "latent", "dense", "token-prediction", "token-prediction-alone"],
)
def test_layouts_train_alike(ranks: RankPool, shape: ModelShape, cases: list[tuple[Layout, StepSettings]]) -> None:
    answers = ranks.run(trained, shape, cases, Dtype.FP32)
    reference = next(answer[0] for answer in answers if answer[0] is not None)
    assert reference[0][0] == pytest.approx(5.52, abs=0.3)  # about log(250): nothing is learnt yet
    for number in range(len(cases)):
        held = [answer[number] for answer in answers if answer[number] is not None]
        losses = [[each[0][step] for each in held if each[0][step] is not None] for step in range(NUM_STEPS)]
        means = [sum(each) / len(each) for each in losses]
        assert means == pytest.approx(reference[0], rel=2e-5)
        assert held[0][1][0] == pytest.approx(reference[1][0], rel=1e-5)
        # AdamW's first steps are the signs of gradients, so those near zero may go either way.
        assert held[0][1] == pytest.approx(reference[1], rel=2e-3)
        logits = next(each[2] for each in held if each[2] is not None)
        assert float((logits - reference[2]).abs().mean()) < 1e-3 * float(reference[2].abs().max())


def test_a_repeated_batch_is_learnt(ranks: RankPool) -> None:
    losses = ranks.run(losses_of_one_batch)[0]
    assert losses[-1] < 0.8 * losses[0]


def losses_of_one_batch(rank: int) -> list[float | None]:
    where = layout(world=8, ep=2)
    model = built(MOE, where, STEPS, Dtype.BF16)
    assert model is not None
    trainer = MegatronTrainer(model, STEPS)
    initialise(read_weights(model))
    trainer.weights_changed()
    return [trainer.step(tokens(0)).loss for _ in range(8)]


def test_a_recorded_step_names_its_parts(ranks: RankPool) -> None:
    for parts in ranks.run(recorded_parts)[:4]:
        assert {"forward", "backward", "gradient sync", "optimizer"} <= parts.keys()
        phases = {f"{part} {way}" for part in ("route", "dispatch", "experts", "combine") for way in WAYS}
        assert phases <= parts.keys()
        assert sum(parts[f"{part} forward"] for part in ("route", "dispatch", "experts", "combine")) < parts["forward"]
        assert all(seconds > 0 for seconds in parts.values())


WAYS = ("forward", "backward")


def recorded_parts(rank: int) -> dict[str, float]:
    """The parts of a step with recording on; the step before and after it leave no trace."""
    steps = with_dispatcher("alltoall")
    model = built(MOE, layout(ep=2, pp=2), steps)
    if model is None:
        return {}
    trainer, spans = MegatronTrainer(model, steps), Spans(torch.device("cpu"))
    initialise(read_weights(model))
    trainer.step(tokens(0))
    trainer.step(tokens(0), spans)
    found = spans.seconds()
    trainer.step(tokens(0))
    assert spans.seconds() == found
    return found


@pytest.mark.parametrize("where", [layout(ep=2), layout(ep=2, pp=2, vpp=2)], ids=["one-stage", "stages"])
def test_overlapped_passes_are_one_part(ranks: RankPool, where: Layout) -> None:
    """Every step of Megatron's combined schedule is recorded: the first forward pass alone, the last backward pass
    alone, which its own timers leave out, and both together in between. Waiting for other stages is not."""
    for found in ranks.run(overlapped, where)[: where.world_size]:
        names, seconds = found
        assert {"forward and backward", "gradient sync", "optimizer"} <= set(names)
        assert not {"forward", "backward"} & set(names)
        num_micro_batches = STEPS.num_microbatches(where.dp)
        if where.pp == 1:
            assert names.count("forward and backward") == num_micro_batches + 1
        else:  # cut by the waits
            assert names.count("forward and backward") > where.vpp * num_micro_batches + 1
        phases = {f"{phase} {way}" for phase in ("route", "dispatch", "experts", "combine") for way in WAYS}
        assert phases <= set(names)
        assert seconds["forward and backward"] > max(seconds[phase] for phase in phases)


class _Names(Spans):
    """Also the name of each part that ended, in order."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.names: list[str] = []

    def stop(self, name: str) -> None:
        self.names.append(name)
        super().stop(name)


def overlapped(rank: int, where: Layout) -> tuple[list[str], dict[str, float]]:
    """The parts of a recorded step with overlap. Of a GPU it needs only what marks profiles and keeps memory alive."""
    steps = replace(STEPS, dispatch=Dispatch("alltoall", overlap=True))
    model = built(MOE, where, steps, Dtype.BF16)
    if model is None:
        return [], {}
    trainer, spans, step = MegatronTrainer(model, steps), _Names(), combined_1f1b.combined_forward_backward_step
    initialise(read_weights(model))
    trainer.weights_changed()
    with contextlib.ExitStack() as stack:
        for holder, name in (
            (torch.cuda.nvtx, "range_push"),
            (torch.cuda.nvtx, "range_pop"),
            (torch.Tensor, "record_stream"),
        ):
            stack.enter_context(patch.object(holder, name, lambda *_: None))
        trainer.step(tokens(0), spans)
        found = list(spans.names)
        trainer.step(tokens(0))
    assert spans.names == found
    assert combined_1f1b.combined_forward_backward_step is step
    return found, spans.seconds()


def test_data_parallelism_waits_for_delayed_weight_gradients(ranks: RankPool) -> None:
    assert ranks.run(delays)[:2] == [[False, True]] * 2


def delays(rank: int) -> list[bool]:
    """What Megatron's data parallelism is told, without and with `--delay-wgrad-compute`."""
    found = []
    for delayed in (False, True):
        steps = replace(STEPS, dispatch=Dispatch("alltoall", overlap=delayed, delay_wgrad=delayed))
        model = built(MOE, layout(ep=2), steps, Dtype.BF16)
        if model is not None:
            with patch.object(training, "DistributedDataParallelConfig", wraps=DistributedDataParallelConfig) as made:
                MegatronTrainer(model, steps)
            found.append(made.call_args.kwargs["delay_wgrad_compute"])
    return found


def test_another_dispatcher_than_asked_for_is_an_error(ranks: RankPool) -> None:
    assert ranks.run(dispatchers_of)[0] == ["MoEAllGatherTokenDispatcher", "MoEAlltoAllTokenDispatcher", "refused"]


def dispatchers_of(rank: int) -> list[str | None]:
    found: list[str | None] = []
    for name in ("allgather", "alltoall"):
        model = built(MOE, layout(world=8, ep=8), with_dispatcher(name))
        assert model is not None
        check_live(model, Dispatch(name))
        found.append(live_dispatcher(model))
    assert model is not None
    with pytest.raises(RefitError, match=r"asked for is flex/deepep .* live model has MoEAlltoAll.* fell back"):
        check_live(model, Dispatch("flex", "deepep"))
    return [*found, "refused"]
