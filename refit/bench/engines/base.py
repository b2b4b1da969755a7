"""RefitEngine: the protocol of a refit implementation that can be measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from refit.bench.sides import Side
from refit.config.scenario import Scenario
from refit.predict.sides import PlannedSides
from refit.transport.base import Connected, Program
from refit.transport.ranks import Ranks


class RefitEngine(Protocol):
    """One refit implementation, constructed once per run. A row of `ENGINES` names the class.

    `connect` and `prepare` raise UnavailableError where the engine cannot run on this machine. The engine is then
    waived with that message as the reason.
    """

    uses_plan: bool
    """Whether this engine uses our plan, so that planning counts as part of its first refit."""

    transport: str
    """What moves its bytes with the scenario's settings on this device: `shm`, `nccl`. Every result names it."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None: ...

    def check_available(self) -> None:
        """Raise UnavailableError that names what is missing and how to get it. Needs no process group."""
        ...

    def connect(self, planned: PlannedSides, ranks: Ranks) -> Connected | None:
        """Do the set-up that a process does once, before it prepares. It counts towards no refit.

        Returns what was connected, None where there was no choice. Collective: every rank of the job.
        """
        ...

    def prepare(self, planned: PlannedSides, source: Side, destination: Side) -> Program:
        """Bind the refit to both models. An engine whose row of ENGINES does not encode gets sides without encodings.

        Collective: every rank of the job.
        """
        ...

    def not_moved(self) -> Mapping[str, str]:
        """The keys of the tensors that the prepared refit leaves as they are, each with the reason.

        The same on every rank. A result with such tensors is partial: they are neither compared nor in any ratio.
        """
        ...

    def note(self) -> str | None:
        """A note for the log on how this engine runs here; None for none."""
        ...
