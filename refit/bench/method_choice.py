"""`--refit-method auto`: the first method of `METHODS` that the machine and the scenario allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from refit.bench.engines.refit import options_of
from refit.bench.exchange import gather
from refit.bench.session import Session
from refit.config.registry import AUTO, METHODS
from refit.config.scenario import Scenario
from refit.errors import UnavailableError, UsageError
from refit.transport.base import get_transport

DEVICES = {"cuda": "GPUs", "cpu": "CPUs"}
"""Type of device -> what notes call such devices."""


def with_method(scenario: Scenario, host_of: Sequence[str]) -> Scenario:
    """`scenario` with a method in place of AUTO, and a note on which and why; itself where it names a method.

    The choice depends on each rank's host, torchrun's variables and this rank's machine only. Raises UnavailableError,
    with the reason for each method, where none can run.
    """
    if scenario.method != AUTO:
        return scenario
    device = scenario.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = options_of(scenario, torch.device(device))
    reasons = []
    for name, method in METHODS.items():
        if device not in method.devices:
            continue
        try:
            check_hosts(name, host_of)
            get_transport(name).check_available(replace(options, own=scenario.method_options.get(name)))
        except UnavailableError as error:
            reasons.append(str(error))
            continue
        why = f" ({'; '.join(reasons)})" if reasons else f": the first choice on {DEVICES[device]}"
        note = f"--refit-method {AUTO}: {name}{why}"
        own = {one: given for one, given in scenario.method_options.items() if one == name}
        return replace(scenario, method=name, method_options=own, device=device, notes=(*scenario.notes, note))
    raise UnavailableError(f"--refit-method {AUTO}: no method can run here: {'; '.join(reasons)}")


def check_hosts(method: str, host_of: Sequence[str]) -> None:
    """Raise UnavailableError where `method` needs all ranks on one host and `host_of` has several. AUTO needs none."""
    names = list(dict.fromkeys(host_of))
    if method != AUTO and METHODS[method].single_host and len(names) > 1:
        device = METHODS[method].device
        instead = next(name for name, other in METHODS.items() if not other.single_host and device in other.devices)
        raise UnavailableError(
            f"{method} needs all ranks on one host, {len(host_of)} ranks are on {len(names)} ({names[0]}, {names[1]}"
            f"{', ...' if len(names) > 2 else ''}): use {instead}"
        )


def check_same_method(session: Session) -> None:
    """Raise UsageError where ranks have chosen different methods. Collective: every rank of the job."""
    for rank, method in enumerate(gather(session.control, session.scenario.method)):
        if method != session.scenario.method:
            raise UsageError(
                f"--refit-method {AUTO} chose {session.scenario.method} on rank {session.rank} and {method} on rank "
                f"{rank}: name the method"
            )
