"""Locks, so that no two processes run the scenarios of one run into the same logs.

The kernel drops a lock (flock) when its holder and all that the holder has started have ended, also after SIGKILL. On
some shared file systems a lock only counts on its own node. So a lock file also names its holder, which empties and
removes it in the end: what another node's holder has left behind is refused unless Slurm says that its job is over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from refit.errors import UsageError
from refit.launch.host import Host
from refit.report.terminal.console import show_aside
from refit.results.plain import plain

Kind = Literal["exclusive", "shared"]
FLAGS = {"exclusive": fcntl.LOCK_EX, "shared": fcntl.LOCK_SH}


@dataclass(frozen=True, slots=True)
class Holder:
    """What a lock file says of its holder: fields as they are in the file, which anyone may have written."""

    kind: str = ""
    host: str = ""
    pid: str = ""
    job: str = ""
    since: str = ""

    @classmethod
    def of(cls, line: str) -> Holder:
        fields = line.split(maxsplit=4)
        return cls(*fields)

    def __str__(self) -> str:
        if not self.host:
            return "a process that has not said its name yet"
        slurm = "" if self.job in ("", "-") else f", job {_quoted(self.job)}"
        since = self.since if re.fullmatch(r"[0-9:\ -]{1,30}", self.since) else _quoted(self.since)
        return f"PID {_quoted(self.pid)} on {_quoted(self.host)}{slurm}, since {since}"

    @property
    def is_gone(self) -> bool:
        """Whether its process, of this host, has ended."""
        if not re.fullmatch("[0-9]{1,12}", self.pid):
            return False
        try:
            os.kill(int(self.pid), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False

    def has_ended(self, is_free: bool, host: Host) -> bool:
        """Whether it has ended. `is_free`: no other process of this node has the lock."""
        if self.host == socket.gethostname():
            return is_free or self.is_gone
        if not re.fullmatch("[0-9]{1,12}", self.job):
            return False
        if self.job == os.environ.get("SLURM_JOB_ID"):
            return True
        code, text = host.output(["squeue", "--noheader", f"--jobs={self.job}", "--format=%T"])
        return not text.strip() if code == 0 else "Invalid job id" in text


@contextmanager
def hold(what: str, kind: Kind, path: Path, host: Host) -> Iterator[None]:
    """Hold a lock within this context, and while anything runs that was started in it.

    Raises UsageError that names its holder where another process has it.
    """
    descriptor, is_free = _open(path, kind)
    try:
        holder = Holder.of(path.read_bytes()[:4096].decode(errors="replace").partition("\n")[0])
        if not is_free:
            raise UsageError(f"{what} is being run by {holder}: {_remedy(holder, path)}")
        if holder.kind and (kind, holder.kind) != ("shared", "shared"):
            if not holder.has_ended(is_free, host):
                raise UsageError(
                    f"{what} may still be run by {holder}, which cannot be seen from here: if that has ended, remove "
                    f"{_escaped(path)}"
                )
            show_aside(f"The lock of {what} was left by {holder}, which has ended")
        job = os.environ.get("SLURM_JOB_ID") or "-"
        line = f"{kind} {socket.gethostname()} {os.getpid()} {job} {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        path.write_text(line, encoding="utf-8")
        try:
            yield
        finally:
            # Of several holders the last removes the file.
            with contextlib.suppress(OSError):
                if kind == "exclusive" or _taken(descriptor, "exclusive"):
                    path.unlink()
    finally:
        os.close(descriptor)


def _open(path: Path, kind: Kind) -> tuple[int, bool]:
    """A descriptor of the lock file, which children inherit, and whether the lock was free."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.set_inheritable(descriptor, True)
        is_free = _taken(descriptor, kind)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, is_free
        os.close(descriptor)  # its last holder has just removed it


def _taken(descriptor: int, kind: Kind) -> bool:
    try:
        fcntl.flock(descriptor, FLAGS[kind] | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remedy(holder: Holder, path: Path) -> str:
    if holder.host == socket.gethostname() and holder.is_gone:
        return f"that PID has ended, but what it started still runs: end it (fuser {_escaped(path)} lists it), or wait"
    return "wait until it has ended, or end it"


def _quoted(value: str) -> str:
    """A value of a lock file as one short word."""
    shown = value if len(value) <= 60 else f"{value[:60]}..."
    return shlex.quote(plain(shown))


def _escaped(path: Path) -> str:
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", str(path))
