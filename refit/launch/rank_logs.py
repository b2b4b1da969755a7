"""The logs that ranks write on their own, beside that of the attempt."""

from __future__ import annotations

import contextlib
import re
import shutil

from refit.launch.base import Job

TORCHRUNS = re.compile(r"node(0|[1-9][0-9]{0,8})/[^/]+/attempt_0/(0|[1-9][0-9]{0,8})/stderr\.log")
"""Where torchrun puts a rank's stderr, by node and local rank."""


def keep_rank_logs(job: Job, exit_code: int) -> None:
    """Keep them after a failure, as `node<N>/rank<R>.err` and without the empty ones; remove them after a success."""
    folder = job.rank_logs
    if not folder.is_dir():
        return
    if exit_code == 0:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for file in sorted(folder.glob("node*/*/attempt_0/*/stderr.log")):
        if found := TORCHRUNS.fullmatch(file.relative_to(folder).as_posix()):
            node, local_rank = map(int, found.groups())
            file.replace(folder / f"node{node}" / f"rank{node * job.ranks_per_node + local_rank}.err")
    for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # a folder that is not empty
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.stat().st_size == 0:
                path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
