"""Rankings of trainers: which runs are ranked together, when their work counts as equal, and the JSON of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.config.layout import Layout
from refit.config.scenario import Mode, Scenario
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.config.steps import StepSettings
from refit.predict.autotp import AutotpOptions
from refit.predict.fsdp2 import Fsdp2Options
from refit.report.steps.step_document import document_text
from refit.report.steps.step_lines import train_closing_lines
from refit.report.steps.trainers import LOSS_BAR, rankings, trainer_text
from refit.results.outcomes import Outcome
from refit.results.result import Result
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.step import Breakdown, StepResult, StepSample
from tests.report.factories import ENVIRONMENT, MODEL, planned

DENSE = replace(MODEL, experts=None)
LIBRARIES = {"megatron": None, "fsdp2": Fsdp2Options(), "autotp": AutotpOptions(zero_stage=2)}


def outcome(
    library: str,
    mean_s: float,
    *,
    tp: int = 2,
    ep: int = 1,
    loss: float = 5.0,
    tokens: int = 512,
    attn_impl: str | None = None,
    autocast: bool = False,
    impl: str = "local",
) -> Outcome:
    """A run on four ranks: one warm-up step and two steps of `mean_s` seconds, half of it forward."""
    layout = Layout(tp, ep, tp if library == "megatron" else 1, 1, 4)
    side = SideSpec(
        layout, format=library, dtype=Dtype.BF16, attn_impl=attn_impl, transformer_impl=impl, options=LIBRARIES[library]
    )
    side = replace(side, dtype=Dtype.FP32, autocast=Dtype.BF16) if autocast else side
    samples = tuple(
        StepSample(n, n == 0, (mean_s,) * 4, 0, tokens, loss - n / 10, 1.0, allocated_bytes=3 << 29, peak_bytes=5 << 29)
        for n in range(3)
    )
    steps = StepSettings(1, 8, 64, num_warmup=1, num_steps=2)
    result = StepResult(
        status=Status.OK,
        optimizer="AdamW",
        vocabulary="split over TP 2: loss",
        num_ranks=4,
        num_microbatches=4,
        sequences_per_step=8,
        flops_per_step=4e12,
        samples=samples,
        summary=summarise([mean_s, mean_s]),
        breakdown=Breakdown(1.0, 0, {"forward": 0.5, "backward": 0.25, "gradient sync": 0.125}, 0.125),
        allocated_bytes_per_rank=(1 << 30, 2 << 30, 0, 0),
        peak_bytes_per_rank=(3 << 30, None, 0, 0),
    )
    scenario = Scenario(
        DENSE, side, side, Mode.COLLOCATED, "gloo", measurements=("train-step",), steps=steps, run_name=library,
        model_name="tiny_qwen3",
    )  # fmt: skip
    run = Result(
        library, status=Status.OK, exit_code=0, scenario=scenario, environment=ENVIRONMENT,
        measurements={"train-step": result},
    )  # fmt: skip
    return Outcome(planned(library), Status.OK, None, run)


def test_libraries_are_ranked_by_their_mean_step() -> None:
    cells = [outcome("autotp", 3.0), outcome("megatron", 2.0), outcome("fsdp2", 2.5)]
    ((*ranking,),) = rankings(cells)
    assert [each.title for each in ranking] == ["megatron TP2 EP1", "fsdp2 TP2 EP1 FSDP2", "autotp TP2 DP2 ZeRO2"]
    text = trainer_text(cells)
    assert "Trainers of tiny_qwen3: 4 ranks, 8 sequences of 64 tokens, micro-batch 1" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("megatron", "fsdp2", "autotp"))]
    assert [row[-1] for row in rows if "+25.0" in row] != []
    assert "+50.0" in text
    assert "autotp TP2 DP2 ZeRO2: AdamW; vocabulary split over TP 2: loss; equal work" in text


def test_each_library_divides_experts_as_it_can() -> None:
    ((first, *others),) = rankings(
        [outcome("autotp", 2.0), outcome("megatron", 2.5, ep=2), outcome("fsdp2", 3.0, ep=4)]
    )
    assert [each.title for each in (first, *others)][1:] == ["megatron TP2 EP2", "fsdp2 TP2 EP4 FSDP2"]


def test_layers_of_transformer_engine_are_a_trainer_of_their_own() -> None:
    cells = [
        outcome("megatron", 2.5),
        outcome("megatron", 2.0, impl="transformer_engine", loss=5.001),
        outcome("fsdp2", 3.0, impl="transformer_engine"),
    ]
    cells = [replace(cell, planned=planned(f"cell{number}")) for number, cell in enumerate(cells)]
    ((*ranking,),) = rankings(cells)
    assert [each.title for each in ranking] == ["megatron TP2 EP1 TE", "megatron TP2 EP1", "fsdp2 TP2 EP1 FSDP2"]
    assert [each.loss_difference for each in ranking] == [0.0, pytest.approx(2e-4, rel=0.1), ranking[1].loss_difference]
    text = trainer_text(cells)
    assert "megatron TP2 EP1 TE: AdamW" in text
    assert "megatron TP2 EP1: AdamW" in text


def test_other_layouts_and_a_single_library_are_not_ranked() -> None:
    assert rankings([outcome("megatron", 2.0), outcome("fsdp2", 2.5, tp=4)]) == []
    assert rankings([outcome("fsdp2", 2.0), outcome("fsdp2", 2.5)]) == []
    assert trainer_text([outcome("fsdp2", 2.0)]) == ""
    failed = replace(outcome("fsdp2", 2.0), status=Status.FAILED)
    assert rankings([outcome("megatron", 2.0), failed]) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": 5.0 * (1 + 2 * LOSS_BAR[Dtype.BF16])}, "losses differ by 2.1e-03, more than 1.0e-03"),
        ({"loss": float("nan")}, "losses differ by nan"),
        ({"tokens": 256}, "tokens differ: 1,536 and 768"),
    ],
)
def test_unequal_work_has_no_delta(change: dict[str, Any], reason: str) -> None:
    text = trainer_text([outcome("megatron", 2.0), outcome("fsdp2", 3.0, **change)])
    assert reason in text
    assert "NOT EQUAL" in text
    assert "+50.0" not in text


def runs_of(library: str, *means_s: float, **changes: Any) -> list[Outcome]:
    return [
        replace(outcome(library, mean_s, **changes), planned=planned(f"{library}_run{number}", run_of=library))
        for number, mean_s in enumerate(means_s, start=1)
    ]


def with_steps(found: Outcome, number: int) -> Outcome:
    """The run with `number` measured steps, all alike."""
    assert found.result is not None
    steps: StepResult = found.result.measurements["train-step"]
    more = replace(steps, samples=steps.samples[:2] + steps.samples[-1:] * (number - 1))
    return replace(found, result=replace(found.result, measurements={"train-step": more}))


def test_single_runs_are_shown_as_ever() -> None:
    golden = Path(__file__).parents[1] / "golden" / "trainers.txt"
    cells = [outcome("autotp", 3.0), outcome("megatron", 2.0), outcome("fsdp2", 2.5, tokens=256)]
    assert trainer_text(cells) + "\n" == golden.read_text()


def test_runs_of_one_scenario_are_one_trainer() -> None:
    cells = [*runs_of("megatron", 2.0, 2.2, 2.1), *runs_of("fsdp2", 2.5, 9.0, 2.5), *runs_of("autotp", 2.15, 2.3)]
    cells[4] = replace(cells[4], status=Status.FAILED, reason="killed")
    ((*ranking,),) = rankings(cells)
    assert [(each.arm.repeated.name, each.arm.mean_s) for each in ranking] == [
        ("megatron", 2.1), ("autotp", pytest.approx(2.225)), ("fsdp2", 2.5),
    ]  # fmt: skip
    text = trainer_text([with_steps(cell, 3) for cell in cells])
    rows = [line.split() for line in text.splitlines() if line.startswith(("megatron TP", "fsdp2 TP", "autotp TP"))]
    beyond = [row[row.index(over) + 1] for row, over in zip(rows, ("+0.0", "+6.0", "+19.0"), strict=False)]
    assert beyond == ["-", "no", "yes"]
    assert f"{1e3 * math.sqrt(0.02 / 3):.2f}" in rows[0], "steps of a run are equal: all deviation is between runs"
    assert "autotp: 2225.00 ms, median of the means of 2 runs (2150.00, 2300.00), spread 6.7 %" in text
    assert "fsdp2_run2 is not counted: failed: killed" in text


def test_a_run_of_other_work_is_named() -> None:
    cells = [*runs_of("megatron", 2.0, 2.0), *runs_of("fsdp2", 3.0, 3.0)]
    cells[3] = replace(runs_of("fsdp2", 3.0, tokens=256)[0], planned=cells[3].planned)
    ((first, second),) = rankings(cells)
    assert first.problems == ()
    assert second.problems == ("fsdp2_run2 against megatron_run1: tokens differ: 1,536 and 768 over all steps",)
    assert "+50.0" not in trainer_text(cells)


def test_other_precision_is_other_work() -> None:
    """Also where the losses are alike. Runs of one precision are compared."""
    cells = [outcome("fsdp2", 2.0, autocast=True), outcome("autotp", 3.0, autocast=True)]
    assert "+50.0" in trainer_text(cells)
    assert "fsdp2 TP2 EP1 FSDP2 autocast" in trainer_text(cells)
    text = trainer_text([outcome("megatron", 2.0), *cells])
    assert text.count("precision differs: bfloat16, and float32 under autocast in bfloat16") == 2
    assert "+50.0" not in text


def test_models_of_transformers_are_compared_with_the_same_attention() -> None:
    sdpa = [outcome("fsdp2", 2.0, attn_impl="sdpa"), outcome("autotp", 3.0, attn_impl="sdpa")]
    assert "+50.0" in trainer_text(sdpa)
    text = trainer_text([outcome("megatron", 2.5), sdpa[0], outcome("autotp", 3.0, attn_impl="eager")])
    assert "autotp TP2 DP2 ZeRO2 eager: AdamW" in text
    assert text.count("NOT EQUAL work: attention differs: sdpa and eager") == 1
    assert "+25.0" in text
    assert "+50.0" not in text


@pytest.mark.parametrize("autocast", [False, True])
def test_the_json_of_a_run_has_its_precision(autocast: bool) -> None:
    found = outcome("fsdp2", 2.0, attn_impl="eager", autocast=autocast).result
    assert found is not None
    assert found.scenario is not None
    config = json.loads(document_text(found.scenario, found.measurements["train-step"]))["config"]
    assert (config["attn_impl"], config["autocast"], config["dtype"]) == ("eager", autocast, "bfloat16")


def test_the_json_of_a_run_has_the_fields_of_the_format() -> None:
    found = outcome("autotp", 2.0)
    assert found.result is not None
    assert found.result.scenario is not None
    document = json.loads(document_text(found.result.scenario, found.result.measurements["train-step"]))
    config, summary = document["config"], document["summary"]
    assert (config["impl"], config["tp_size"], config["dp_size"], config["batch_size"]) == ("autotp", 2, 2, 1)
    assert (config["zero_stage"], config["gradient_accumulation_steps"], config["dtype"]) == (2, 4, "bfloat16")
    assert (config["activation_checkpointing"], config["autocast"]) == (False, False)
    assert [step["step"] for step in document["steps"]] == [1, 2]  # warm-up is left out
    assert document["steps"][0] == {
        "step": 1, "loss": 4.9, "step_time_s": 2.0, "tokens_per_sec": 256.0, "samples_per_sec": 4.0,
        "memory_allocated_gb": 1.5, "memory_peak_gb": 2.5,
    }  # fmt: skip
    assert (summary["num_steps"], summary["avg_step_time_ms"], summary["std_step_time_ms"]) == (2, 2000.0, 0.0)
    assert (summary["avg_tokens_per_sec"], summary["avg_samples_per_sec"]) == (256.0, 4.0)
    assert (summary["avg_loss"], summary["final_loss"]) == (pytest.approx(4.85), 4.8)
    assert (summary["memory_allocated_gb"], summary["peak_memory_gb"]) == (2.0, 3.0)
    parts = summary["timing_breakdown"]
    shares = {name: parts[name] for name in parts if name.endswith("_pct")}
    assert shares == {"forward_pct": 50.0, "backward_pct": 25.0, "optimizer_pct": 0.0, "other_pct": 25.0}


def test_forward_and_backward_together_are_neither() -> None:
    """A schedule that overlaps them has one time of both."""
    found = outcome("megatron", 2.0)
    assert found.result is not None
    assert found.result.scenario is not None
    steps = replace(
        found.result.measurements["train-step"],
        breakdown=Breakdown(2.0, 0, {"forward and backward": 1.5, "gradient sync": 0.1, "optimizer": 0.2}, 0.2),
    )
    parts = json.loads(document_text(found.result.scenario, steps))["summary"]["timing_breakdown"]
    assert {name: parts[name] for name in parts if name.endswith("_pct")} == {
        "forward_pct": None, "backward_pct": None, "optimizer_pct": 10.0, "forward_and_backward_pct": 75.0,
        "other_pct": pytest.approx(15.0),
    }  # fmt: skip
    assert (parts["forward_time_s"], parts["forward_and_backward_time_s"]) == (None, 1.5)
    (line,) = (line for line in train_closing_lines(steps, found.result) if line.startswith("Breakdown"))
    assert ": forward and backward 1500.00 ms (75 %), gradient sync 100.00 ms (5 %), optimizer " in line
