"""Hardware, model and date of results, as the second line of a picture's title."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refit import units
from refit.report.terminal.escaped import picture_text
from refit.results.outcomes import Outcome
from refit.results.sweep import Sweep

DATE_LENGTH = len("2026-01-26")
"""ISO 8601 begins with the date."""


def caption(outcomes: Sequence[Outcome], sweep: Sweep | None = None) -> str:
    """`2 hosts of 8 x NVIDIA H200, kimi_k2, 2026-01-26`. Where results differ, both values or their number.

    A sweep adds its title, and its date where no result has one.
    """
    dates = sorted({date for outcome in outcomes if (date := _date(outcome))})
    parts = [
        *([sweep.title] if sweep and sweep.title else []),
        _hosts(outcomes) + _joined((hardware(outcome) for outcome in outcomes), "machines"),
        _joined((model(outcome) for outcome in outcomes), "models"),
        " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else sweep.date[:DATE_LENGTH] if sweep else "",
    ]
    return picture_text(", ".join(part for part in parts if part))


def hardware(outcome: Outcome) -> str | None:
    """One host: `4 x NVIDIA H200`, `CPU: 2 cores of AMD EPYC`; None where it was not recorded."""
    environment = outcome.result.environment if outcome.result else None
    if environment is None:
        return None
    if environment.gpus and (outcome.result is None or outcome.result.device != "cpu"):
        return f"{len(environment.gpus)} x {environment.gpus[0].name}"
    return f"CPU: {environment.num_cpus} cores of {environment.cpu}" if environment.cpu else None


def _hosts(outcomes: Sequence[Outcome]) -> str:
    """`up to 12 hosts of `; nothing where one host was enough."""
    counts = sorted({outcome.planned.nodes for outcome in outcomes if outcome.result and outcome.result.environment})
    if not counts or counts[-1] <= 1:
        return ""
    return f"{'up to ' if len(counts) > 1 else ''}{counts[-1]} hosts of "


def model(outcome: Outcome) -> str | None:
    """The preset or the provider, else layers, width and elements."""
    scenario, facts = outcome.result.scenario if outcome.result else None, outcome.refit.model
    if scenario and scenario.model_title:
        return scenario.model_title
    shape = scenario.model if scenario else None
    parts = [f"{shape.num_layers} layers of width {shape.hidden_size}"] if shape else []
    parts += [f"{shape.experts.num_experts} experts"] if shape and shape.experts else []
    parts += [f"{units.count(facts.num_parameters)} elements"] if facts else []
    return ", ".join(parts) or None


def _date(outcome: Outcome) -> str:
    started = outcome.result.started if outcome.result else None
    return (started or "")[:DATE_LENGTH]


def _joined(values: Iterable[str | None], what: str) -> str:
    found = list(dict.fromkeys(value for value in values if value))
    return " / ".join(found) if len(found) <= 2 else f"{len(found)} {what}"
