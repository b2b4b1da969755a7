#!/usr/bin/env bash
# checkpoint-engine 0.4.2: `ParameterServer(rank=0, ...)` is not rank 0 but what the variable RANK says.
#
# Seen in a process whose RANK is 3, as on the fourth rank of a torchrun job, for a server of its own (world_size=1):
#   rank=0, world_size=1: the server is rank 3 of 1, and no error says so
#   rank=1, world_size=2: the server is rank 1, as told
# Seen without RANK: rank=0 raises KeyError('RANK'), rank=1 does not look for it. The code is
# `rank or int(os.environ["RANK"])`, for which 0 is no rank. A trainer whose engines are updated by groups of its ranks
# has to set RANK around the call.
#
# The rank is settled before the server looks for a GPU, so this runs without one.
# Fails (exit code 1) once rank=0 is taken.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 checkpoint-engine==0.4.2 fastapi==0.136.3 numpy==2.4.1
cat >"$folder/look.py" <<'PYTHON'
import os
import sys

from checkpoint_engine.ps import ParameterServer


def rank_of(environment, **given):
    """The rank that a server settles on, from the object that its constructor was making when it missed a GPU."""
    os.environ.pop("RANK", None)
    os.environ.update(environment)
    try:
        server = ParameterServer(auto_pg=False, master_addr="127.0.0.1", master_port=0, gpu_count=1, **given)
        return server._rank
    except KeyError as error:
        return f"KeyError({error})"
    except Exception as error:
        frame = error.__traceback__
        while frame is not None:
            made = frame.tb_frame.f_locals.get("self")
            if isinstance(made, ParameterServer):
                return made._rank
            frame = frame.tb_next
        raise


found = [
    rank_of({"RANK": "3"}, rank=0, world_size=1),
    rank_of({"RANK": "3"}, rank=1, world_size=2),
    rank_of({}, rank=0, world_size=1),
]
print("RANK=3, rank=0:", found[0])
print("RANK=3, rank=1:", found[1])
print("no RANK, rank=0:", found[2])
sys.exit(found != [3, 1, "KeyError('RANK')"])
PYTHON
if "$folder/venv/bin/python" "$folder/look.py"; then
    echo "As described: rank=0 is not taken."
else
    echo "Not as described: see above." >&2
    exit 1
fi
