"""Training steps of one run as the JSON of a tensor-parallelism benchmark: `config`, `steps` and `summary`.

The names are those of that format. Parts of a step are timed in one more step, not in every one, so that recording does
not disturb the others: they are under `timing_breakdown`.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from refit.config.scenario import Scenario
from refit.config.steps import StepSettings
from refit.results.step import COMBINED, StepResult, StepSample

GB = 1 << 30
"""Bytes of what the format calls a GB (torch's allocator divided by 1024 three times)."""


def document_text(scenario: Scenario, result: StepResult) -> str:
    """The JSON text of a run with measured steps."""
    assert scenario.steps is not None, "training steps have settings"
    document = {
        "config": _config(scenario, scenario.steps, result),
        "steps": [_step(sample, result) for sample in result.measured],
        "summary": _summary(result),
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _config(scenario: Scenario, steps: StepSettings, result: StepResult) -> dict[str, Any]:
    side = scenario.source
    return {
        "model_name": scenario.model_title,
        "impl": side.format,
        "tp_size": side.layout.tp,
        "dp_size": side.layout.dp,
        **(side.options.recorded if side.options is not None else {}),
        "attn_impl": side.attn_impl,
        "batch_size": steps.micro_batch_size,
        "seq_length": steps.seq_length,
        "gradient_accumulation_steps": result.num_microbatches,
        "num_training_steps": steps.num_warmup + steps.num_steps,
        "warmup_steps": steps.num_warmup,
        "learning_rate": steps.lr,
        "weight_decay": steps.weight_decay,
        "max_grad_norm": steps.clip_grad,
        "activation_checkpointing": steps.recompute.granularity is not None,
        "autocast": side.autocast is not None,
        "dtype": side.compute_dtype.value if side.compute_dtype is not None else None,
        "seed": steps.seed,
        "optimizer": result.optimizer,
        "vocab_parallel": result.vocabulary,
    }


def _step(sample: StepSample, result: StepResult) -> dict[str, Any]:
    return {
        "step": sample.step,
        "loss": sample.loss,
        "step_time_s": sample.seconds,
        "tokens_per_sec": sample.num_tokens / sample.seconds,
        "samples_per_sec": result.sequences_per_step / sample.seconds,
        "memory_allocated_gb": _gb(sample.allocated_bytes),
        "memory_peak_gb": _gb(sample.peak_bytes),
    }


def _summary(result: StepResult) -> dict[str, Any]:
    seconds, losses = ([sample.seconds for sample in result.measured], [sample.loss for sample in result.measured])
    known = [loss for loss in losses if loss is not None]
    return {
        "num_steps": len(seconds),
        "avg_step_time_ms": 1e3 * statistics.fmean(seconds),
        "std_step_time_ms": 1e3 * statistics.pstdev(seconds),
        "avg_tokens_per_sec": statistics.fmean(sample.num_tokens / sample.seconds for sample in result.measured),
        "avg_samples_per_sec": statistics.fmean(result.sequences_per_step / each for each in seconds),
        "avg_loss": statistics.fmean(known) if len(known) == len(losses) else None,
        "final_loss": losses[-1],
        "memory_allocated_gb": _gb(result.allocated_bytes),
        "peak_memory_gb": _gb(result.peak_bytes),
        "timing_breakdown": _breakdown(result),
    }


def _breakdown(result: StepResult) -> dict[str, float | None] | None:
    """Shares of the recorded step, and its times. Gradient sync is part of `other`, as is waiting.

    Where forward and backward run together, both are null, and `forward_and_backward` is beside them.
    """
    found = result.breakdown
    if found is None:
        return None
    parts: dict[str, float | None] = {
        part: found.parts_s.get(part, 0.0) for part in ("forward", "backward", "optimizer")
    }
    if COMBINED in found.parts_s:
        parts |= {"forward": None, "backward": None, "forward_and_backward": found.parts_s[COMBINED]}
    parts["other"] = found.seconds - sum(filter(None, parts.values()))
    shares = {
        f"{part}_pct": None if seconds is None else 100 * seconds / found.seconds for part, seconds in parts.items()
    }
    return {**shares, **{f"{part}_time_s": seconds for part, seconds in parts.items()}, "step_time_s": found.seconds}


def _gb(nbytes: int | None) -> float | None:
    return nbytes / GB if nbytes is not None else None
