#!/usr/bin/env bash
# torch 2.13.0: a process that a rank of torchrun starts cannot make a process group of its own, though it names an
# address, is rank 0 and the only one: it connects to a store that nobody serves.
#
# torchrun sets TORCHELASTIC_USE_AGENT_STORE=True, since its agent serves the store of its ranks. Children inherit it,
# and init_process_group then makes no store for any tcp:// address, also one that has nothing to do with torchrun's
# MASTER_ADDR. An inference engine that a trainer's rank starts (vLLM 0.25.0 with its model in the same process does
# so) waits in its start for the timeout of the group, half an hour by default, and no log says for what. Removing
# RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from its environment, which is what one thinks of, does not help.
#
# Seen: without the variable a group in 0.0 s; with it, and nothing else of torchrun's, DistNetworkError after the
# timeout. Fails (exit code 1) once the variable is ignored for such an address.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy
cat >"$folder/engine.py" <<'PYTHON'
"""What an engine with one worker does when it starts. Prints what came of it."""
import socket
from datetime import timedelta

import torch.distributed as dist

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
try:
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1, timeout=timedelta(seconds=5))
    print("a group of", dist.get_world_size())
except Exception as error:
    print(type(error).__name__)
PYTHON
cat >"$folder/trainer.py" <<'PYTHON'
"""A rank of torchrun that starts an engine, without the variables that would tell it of other ranks."""
import os
import subprocess
import sys

own = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
kept = {name: value for name, value in os.environ.items() if name not in own}
for without in ((), ("TORCHELASTIC_USE_AGENT_STORE",)):
    environment = {name: value for name, value in kept.items() if name not in without}
    found = subprocess.run([sys.executable, sys.argv[1]], env=environment, stdout=subprocess.PIPE, text=True)
    print(found.stdout.strip())
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 \
    "$folder/trainer.py" "$folder/engine.py" 2>/dev/null >"$folder/found.txt"
cat "$folder/found.txt"
printf 'DistNetworkError\na group of 1\n' | diff - "$folder/found.txt"
