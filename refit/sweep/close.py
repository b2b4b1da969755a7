"""Completes the result of an attempt that did not record how it ended, from its exit code and its log."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refit.errors import ExitCode
from refit.results.result import CANCELLED, CONSEQUENCES, Failure, Result, ResultFile, now
from refit.results.status import Status
from refit.results.sweep import Attempt

LOG_TAIL_BYTES = 1 << 20
TELLING = re.compile(r"(error|FAILED): ")
RANK_PREFIX = re.compile(r"\A\s*(?:\[\S+?\]:\s*|\d+:\s+)")
"""What `torchrun --tee` and `srun --label` put before a rank's lines."""

ROOT_CAUSE = re.compile(
    r"Root Cause.*?time *: (?P<time>\S+).*?host *: (?P<host>\S+).*?rank *: (?P<rank>\d+)"
    r".*?exitcode *: (?P<exit_code>-?\d+)",
    re.DOTALL,
)
"""The end of what torchrun prints when a rank fails (`torch.distributed.elastic.multiprocessing.errors`); its own exit
code is 1 whatever the rank's was."""


NOTICED = re.compile(
    rf"FAILED: rank (?P<rank>\d+) failed in phase '(?P<phase>[^']*)': (?:{'|'.join(map(re.escape, CONSEQUENCES))})"
)
"""The ranks' verdict where one of them is gone. Its launcher alone knows which signal ended it."""

ENDED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGBUS)
"""Exit codes of ranks that said nothing: what others say afterwards follows from their end."""

ADVICE = {
    "SIGKILL": "most likely the kernel, for lack of memory (`dmesg` says so): use fewer ranks per host, a "
    "smaller model or a lower --staging-mib",
    "SIGBUS": "memory that it mapped is not there, such as in a full /dev/shm: make it larger, or use fewer ranks per "
    "host",
    "SIGTERM": "it was told to stop: by you, by the batch system, or because its launcher was ended",
}
"""What to do about a signal."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the command of an attempt ended. `timed_out_s` is the time limit that it exceeded."""

    exit_code: int
    timed_out_s: float | None = None
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Cause:
    """An exit code (negative for a signal, as torchrun writes it), and its rank and host, where they are known."""

    exit_code: int
    rank: int | None
    host: str = ""


def close(attempt: Attempt, ending: Ending) -> Result:
    """The attempt's result, completed and written where the run could not do so. Its measurements are kept.

    A result that records how the run ended is not changed, unless a time limit or a cancelled job ended the run.
    """
    file = ResultFile(attempt.json)
    result = file.read()
    ended_from_outside = ending.cancelled or ending.timed_out_s is not None
    unsettled = (Status.RUNNING, Status.FAILED) if ended_from_outside else (Status.RUNNING,)
    log = _tail(attempt.log)
    cause = root_cause(log, ending.exit_code)
    if result.status not in unsettled and not tells_more(cause, result):
        return result
    status = Status.WAIVED if cause.exit_code == ExitCode.WAIVED and not ended_from_outside else Status.FAILED
    completed = replace(
        result,
        status=status,
        exit_code=int(status.exit_code),
        failure=Failure(
            message=_message(ending, cause, log, status is Status.WAIVED),
            # Errors common to all ranks are not attributed to one.
            rank=None if cause.exit_code in (ExitCode.WAIVED, ExitCode.USAGE) else cause.rank,
            phase=phase_of(cause, result),
        ),
        finished=now(),
    )
    file.write(completed)
    return completed


def tells_more(cause: Cause, result: Result) -> bool:
    """Whether the launcher knows the signal that ended a rank, and the result has only what followed from it."""
    failure = result.failure
    if failure is None or not killed_text(cause) or failure.message == killed_text(cause):
        return False
    return cause.exit_code in ENDED_FROM_OUTSIDE or any(text in failure.message for text in CONSEQUENCES)


def phase_of(cause: Cause, result: Result) -> str | None:
    """The phase that the result gives, unless it is that of another rank than the one that was killed."""
    failure = result.failure
    if failure is None or (killed_text(cause) and failure.rank != cause.rank):
        return None
    return failure.phase


def _message(ending: Ending, cause: Cause, log: Sequence[str], waived: bool) -> str:
    if ending.cancelled:
        return CANCELLED
    if ending.timed_out_s is not None:
        return f"timed out after {ending.timed_out_s:g} s"
    line = telling_line(log)
    if ended_by_signal := killed_text(cause):
        return ended_by_signal
    if waived:
        return line or "what it needs is not there (exit code 3)"
    return f"ended with exit code {_code_text(cause.exit_code)}: {line or 'the log is empty'}"


def killed_text(cause: Cause) -> str:
    """`killed on node7 by signal 9 (SIGKILL), ...` with what to do; "" for a rank that no signal ended."""
    if cause.rank is None or cause.exit_code >= 0:
        return ""
    number = -cause.exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    advice = ADVICE.get(name, "its last lines above, or in the logs of its rank, may say why")
    return f"killed{f' on {cause.host}' if cause.host else ''} by signal {number} ({name}): {advice}"


def _code_text(exit_code: int) -> str:
    """Shells report a signal as 128 + its number, torchrun as its number below zero."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    return f"{exit_code} (killed by signal {number})" if number > 0 else str(exit_code)


def root_cause(log: Sequence[str], exit_code: int) -> Cause:
    """The rank that failed first on any node, as torchrun reports it; otherwise the command's own exit code."""
    reports = list(ROOT_CAUSE.finditer("\n".join(log))) if exit_code == 1 else []
    if not reports:
        return Cause(exit_code, None)
    first = min(reports, key=lambda report: report["time"])
    return Cause(int(first["exit_code"]), int(first["rank"]), first["host"])


def telling_line(log: Sequence[str]) -> str:
    """The last line that starts with `error:` or `FAILED:`, without that word; else the last line that is not empty.

    "" where all lines are empty.
    """
    lines = [stripped for line in log if (stripped := RANK_PREFIX.sub("", line, count=1).strip())]
    telling = [TELLING.sub("", line, count=1) for line in lines if TELLING.match(line)]
    return (telling or lines or [""])[-1]


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
