"""Whether a result is one of the scenario in whose place it lies."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from refit.config.options import flags_of
from refit.config.registry import AUTO, METHODS
from refit.config.scenario import Scenario
from refit.results.result import Result
from refit.results.sweep import Planned

NOT_COMPARED = ("output_dir", "run_name", "cluster", "notes", "recorded")
"""Fields of a scenario that do not change what is measured. The sweep sets the first three for each attempt."""

MOST_NAMED = 3


def foreign(planned: Planned, result: Result) -> str | None:
    """Why `result` is not one of the `planned` scenario, naming what differs; None where it is.

    A run that ended before it recorded its scenario has nothing to compare, and neither has a sweep file of an older
    version.
    """
    if planned.scenario is None or (result.scenario is None and not result.status.has_measured):
        return None
    if result.scenario is None:
        return "its result file is of another scenario: it does not say which"
    found = differences(planned.scenario, result.scenario)
    if not found:
        return None
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return f"its result file is of another scenario: {', '.join(found[:MOST_NAMED])}{more}"


def differences(planned: Scenario, ran: Scenario) -> list[str]:
    """`model.hidden_size 1024, planned 512`, one for each field that differs.

    On CPUs the stand-in of a GPU method counts as that method. A run records what AUTO chose, and the device with it.
    """
    found: list[str] = []
    chosen = _chosen(planned, ran)
    for field in fields(Scenario):
        if field.name == "method_options":
            _compare_own(planned, ran, found)
        elif field.name not in NOT_COMPARED and field.name not in chosen:
            _compare(field.name, getattr(planned, field.name), getattr(ran, field.name), found)
    return found


def _chosen(planned: Scenario, ran: Scenario) -> tuple[str, ...]:
    """The fields that a run fills in for the planned scenario. On CPUs no GPU is shared."""
    if planned.method == AUTO:
        on_cpus = ran.method in METHODS and (ran.device or METHODS[ran.method].device) == "cpu"
        shared = ("ranks_per_gpu",) if on_cpus else ()
        return ("method", *shared) if planned.device else ("method", "device", *shared)
    stands_in = planned.method in METHODS and ran.method == METHODS[planned.method].cpu_stand_in
    return ("method", "ranks_per_gpu") if stands_in else ()


def _compare_own(planned: Scenario, ran: Scenario, found: list[str]) -> None:
    """Compare the settings of the method that ran; of a stand-in, those that both methods have."""
    before, after = planned.method_options.get(ran.method, planned.own_options), ran.own_options
    if before is not None and after is not None:
        for name in sorted(flags_of(type(before)).keys() & flags_of(type(after)).keys()):
            _compare(f"method_options.{name}", getattr(before, name), getattr(after, name), found)


def _compare(name: str, before: object, after: object, found: list[str]) -> None:
    if before == after:
        return
    if is_dataclass(before) and type(before) is type(after):
        for field in fields(before):
            _compare(f"{name}.{field.name}", getattr(before, field.name), getattr(after, field.name), found)
    elif is_dataclass(before) or is_dataclass(after):
        found.append(f"another {name}")
    else:
        found.append(f"{name} {_text(after)}, planned {_text(before)}")


def _text(value: object) -> str:
    text = str(getattr(value, "value", value))
    return text if len(text) <= 40 else f"{text[:40]}..."
