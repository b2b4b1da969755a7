"""Status: the state of a scenario, an engine or a measurement. The only list of these names."""

from __future__ import annotations

from enum import Enum

from refit.errors import ExitCode


class Status(str, Enum):
    """Before a run: READY, REFUSED (the check failed) or SKIPPED (a combination of axis values that cannot run).

    During a run: RUNNING. After it: OK, WRONG_DATA, FAILED or WAIVED (something it needs is missing).
    MISSING: not started, or interrupted.
    """

    READY = "ready"
    RUNNING = "running"
    OK = "ok"
    WRONG_DATA = "wrong_data"
    FAILED = "failed"
    WAIVED = "waived"
    REFUSED = "refused"
    SKIPPED = "skipped"
    MISSING = "missing"

    @property
    def text(self) -> str:
        """As reports print it."""
        return self.value.replace("_", " ")

    @property
    def has_ended(self) -> bool:
        """Whether a run with this status has recorded how it ended."""
        return self in EXIT_CODES

    @property
    def has_measured(self) -> bool:
        """Whether a run with this status has measured something to its end."""
        return self in (Status.OK, Status.WRONG_DATA)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of a process whose result has this status."""
        return EXIT_CODES.get(self, ExitCode.FAILED)


EXIT_CODES = {
    Status.OK: ExitCode.OK,
    Status.WRONG_DATA: ExitCode.WRONG_DATA,
    Status.WAIVED: ExitCode.WAIVED,
    Status.FAILED: ExitCode.FAILED,
}

COUNTED = (
    Status.OK,
    Status.WRONG_DATA,
    Status.FAILED,
    Status.WAIVED,
    Status.REFUSED,
    Status.SKIPPED,
    Status.MISSING,
)
"""Every status of a scenario's outcome, in the order in which summaries count them."""


def worst(statuses: list[Status]) -> Status:
    """The worst of these: WRONG_DATA, then FAILED, RUNNING, WAIVED, and otherwise OK."""
    order = (Status.WRONG_DATA, Status.FAILED, Status.RUNNING, Status.WAIVED)
    return next((status for status in order if status in statuses), Status.OK)
