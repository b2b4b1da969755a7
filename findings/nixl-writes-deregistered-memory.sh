#!/usr/bin/env bash
# nixl-cu13 1.5.1 with the UCX in its wheel, without a GPU, two processes of one host: a write into memory that its owner
# has deregistered ends as DONE, and the bytes are there.
#
# The writer has taken in the owner's metadata before. Within a host UCX writes by CMA (process_vm_writev), for which
# registration means nothing: a write lands wherever the address points. So deregistering neither keeps late writers out
# nor names them: memory that is freed and used again is overwritten in silence. Whoever takes back memory must know by a
# protocol of its own that nobody writes it any more. Seen here, a write before deregistering and the same after it:
#   registered:   DONE, arrived
#   deregistered: DONE, arrived
#
# Fails (exit code 1) once the write after deregistering fails, or does not arrive.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nixl-cu13==1.5.1 numpy
cat >"$folder/look.py" <<'PYTHON'
"""A parent writes into the memory of its child, before and after the child has deregistered it."""
import ctypes
import multiprocessing
import time

SIZE = 1 << 20


def agent(name):
    from nixl_cu13 import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def wait(pipe, own):
    while not pipe.poll(0.001):
        own.get_new_notifs()
    return pipe.recv()


def owner(pipe):
    own = agent("owner")
    memory = ctypes.create_string_buffer(SIZE)
    place = [(ctypes.addressof(memory), SIZE, 0, "")]
    registered = own.register_memory(place, "DRAM")
    pipe.send((own.get_agent_metadata(), ctypes.addressof(memory)))
    own.add_remote_agent(wait(pipe, own))
    for deregisters in (True, False):
        wait(pipe, own)
        pipe.send(memory.raw == b"x" * SIZE)
        ctypes.memset(memory, 0, SIZE)
        if deregisters:
            own.deregister_memory(registered)
        pipe.send(own.get_agent_metadata())


def written(own, pipe, write):
    start = time.monotonic()
    try:
        state = own.transfer(write)
        while state == "PROC" and time.monotonic() < start + 10:
            state = own.check_xfer_state(write)
    except Exception as error:
        state = type(error).__name__
    pipe.send("look")
    arrived = wait(pipe, own)
    wait(pipe, own)
    return f"{state}, {'arrived' if arrived else 'not arrived'}"


if __name__ == "__main__":
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=owner, args=(theirs,), daemon=True)
    process.start()
    own = agent("writer")
    memory = ctypes.create_string_buffer(b"x" * SIZE, SIZE)
    own.register_memory([(ctypes.addressof(memory), SIZE, 0, "")], "DRAM")
    metadata, address = pipe.recv()
    name = own.add_remote_agent(metadata).decode()
    pipe.send(own.get_agent_metadata())
    here = own.get_xfer_descs([(ctypes.addressof(memory), SIZE, 0)], "DRAM")
    there = own.get_xfer_descs([(address, SIZE, 0)], "DRAM")
    write = own.initialize_xfer("WRITE", here, there, name)
    print(f"registered:   {written(own, pipe, write)}")
    print(f"deregistered: {written(own, pipe, write)}")
PYTHON
(cd "$folder" && NIXL_LOG_LEVEL=ERROR UCX_TLS="${UCX_TLS:-all}" "$folder/venv/bin/python" look.py) | tee "$folder/seen.txt"
if ! grep -qx 'registered:   DONE, arrived' "$folder/seen.txt" || ! grep -qx 'deregistered: DONE, arrived' "$folder/seen.txt"; then
    echo "Not as described." >&2
    exit 1
fi
