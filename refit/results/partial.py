"""What an interrupted run measured: times over the refits and steps that it completed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refit.results.refit import EngineResult, RefitResult
from refit.results.result import Result
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.step import StepResult


def with_partial_times(result: Result) -> Result:
    """`result` with a summary of what it has measured so far, where an engine or a step has none yet.

    They stay `running`, which is what `EngineResult.doubt` goes by: none of these times counts as a result.
    """
    return replace(result, measurements={name: _summarised(found) for name, found in result.measurements.items()})


def _summarised(found: Any) -> Any:
    if isinstance(found, RefitResult):
        return replace(found, engines={name: _engine(engine) for name, engine in found.engines.items()})
    if isinstance(found, StepResult) and found.status is Status.RUNNING and found.measured and found.summary is None:
        return replace(found, summary=summarise([sample.seconds for sample in found.measured]))
    return found


def _engine(engine: EngineResult) -> EngineResult:
    if not engine.is_partial or engine.summary is not None:
        return engine
    return replace(engine, summary=summarise(engine.measured_s))


def progress_text(result: Result) -> str:
    """`49 of 400 refits`: those measured of those asked for; "" unless the run ended within them."""
    engine, scenario = result.refit.tested if result.refit else None, result.scenario
    if engine is None or scenario is None or not engine.is_partial:
        return ""
    turns = len(scenario.delta.shares) if scenario.delta else 1
    return f"{engine.num_timed:,} of {turns * scenario.most_iterations:,} refits"
