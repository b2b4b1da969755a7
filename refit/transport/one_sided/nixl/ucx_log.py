"""What UCX writes of its choices: which transport carries a write of which size between two processes.

UCX has no call for it that NIXL would let through. It prints its choices as tables when it makes them (UCX_PROTO_INFO),
which go into memory of this process here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

VARIABLES = ("UCX_PROTO_INFO", "UCX_LOG_FILE")
"""Where a user has set one of them, the choices stay unknown here."""


class UcxLog:
    """What UCX writes of its choices and its errors, in memory of this process."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._read = 0

    @contextlib.contextmanager
    def asked_for(self) -> Iterator[None]:
        """Within this context UCX is loaded, and reads its settings. Results name those that the user has made."""
        if any(name in os.environ for name in VARIABLES):
            yield
            return
        self._descriptor = os.memfd_create("ucx")
        os.environ.update(zip(VARIABLES, ("y", f"/proc/self/fd/{self._descriptor}"), strict=True))
        try:
            yield
        finally:
            for name in VARIABLES:
                del os.environ[name]

    @property
    def is_open(self) -> bool:
        return self._descriptor is not None

    def new_ways(self) -> str | None:
        text = self._text()
        new, self._read = text[self._read :], len(text)
        return ways_in(new)

    def last_error(self) -> str | None:
        found = re.findall(r" UCX +ERROR +(.+)", self._text())
        return found[-1].strip() if found else None

    def _text(self) -> str:
        if self._descriptor is None:
            return ""
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, 0).decode(errors="replace")


WRITES = re.compile(r"remote memory write by ucp_put")
ROW = re.compile(r"\|\s*(\d\S*\.\.\S+|\d+)\s*\|\s*(.*?)\s*\|\s*(.*?)\s*\|")


def ways_in(text: str) -> str | None:
    """The transport of the largest writes to peers, as UCX's tables of choices say: `cma/memory`, `tcp/eth0`.

    A table has a row for each range of sizes, in their order:

        | a intra-node cfg#1                                              |
        | remote memory write by ucp_put*(multi) from host memory to host |
        | 0..inf | zero-copy | cma/memory                                 |
    """
    found: dict[str, None] = {}
    last, title, is_write = "", "", False
    for line in (line.partition("]   ")[2] or line for line in text.splitlines()):
        if " cfg#" in line:
            found |= dict.fromkeys([last] if last else [])
            last, title, is_write = "", line, False
        elif WRITES.search(line):
            is_write = " self cfg#" not in title
        elif is_write and (row := ROW.search(line)):
            last = row[3]
    found |= dict.fromkeys([last] if last else [])
    return ", ".join(found) or None
