#!/usr/bin/env bash
# nixl-cu13 1.5.1 with the UCX in its wheel, without a GPU, two processes of one host, agents without a progress thread: a
# write by CMA ends only once its target has called NIXL, although the kernel has copied the bytes and the target has
# nothing to do.
#
# Seen here, with a target that sleeps for 2 s: every write to it takes 2.0 s and more, one to a target that calls NIXL
# 0.01 s and less. With a progress thread in both processes (enable_prog_thread, the default) both are fast: that thread
# is a part of every transfer, also of those that copy without the target. So a process that does without it must go on
# calling NIXL until its peers have ended, not only until it has what it wants.
#
# Fails (exit code 1) once a write ends while its target sleeps, or a thread does not help.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nixl-cu13==1.5.1 numpy
cat >"$folder/look.py" <<'PYTHON'
"""A parent writes into the memory of its child, which calls NIXL all the time, or sleeps for two seconds."""
import ctypes
import multiprocessing
import sys
import time

SIZE = 1 << 20
SLEEP_S = 2.0


def agent(name):
    from nixl_cu13 import nixl_agent, nixl_agent_config

    thread = sys.argv[1] == "thread"
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=thread, backends=["UCX"]))


def wait(pipe, own):
    while not pipe.poll(0.001):
        own.get_new_notifs()
    return pipe.recv()


def target(pipe):
    own = agent("target")
    memory = ctypes.create_string_buffer(SIZE)
    own.register_memory([(ctypes.addressof(memory), SIZE, 0, "")], "DRAM")
    pipe.send((own.get_agent_metadata(), ctypes.addressof(memory)))
    own.add_remote_agent(wait(pipe, own))
    while True:
        if wait(pipe, own) == "sleep":
            pipe.send("asleep")
            time.sleep(SLEEP_S)
            pipe.send(memory.raw[:1])


def written(own, write):
    start = time.monotonic()
    state = own.transfer(write, b"note")
    while state == "PROC":
        state = own.check_xfer_state(write)
    return time.monotonic() - start


if __name__ == "__main__":
    pipe, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    own = agent("writer")
    memory = ctypes.create_string_buffer(b"x" * SIZE, SIZE)
    own.register_memory([(ctypes.addressof(memory), SIZE, 0, "")], "DRAM")
    metadata, address = pipe.recv()
    name = own.add_remote_agent(metadata).decode()
    pipe.send(own.get_agent_metadata())
    here = own.get_xfer_descs([(ctypes.addressof(memory), SIZE, 0)], "DRAM")
    write = own.initialize_xfer("WRITE", here, own.get_xfer_descs([(address, SIZE, 0)], "DRAM"), name)
    for number in range(1, 5):
        ctypes.memset(memory, 64 + number, SIZE)
        awake = written(own, write)
        pipe.send("sleep")
        pipe.recv()
        asleep = written(own, write)
        pipe.recv()
        print(f"write {number}: target awake {awake:.2f} s, target asleep {asleep:.2f} s")
PYTHON
for mode in none thread; do
    (cd "$folder" && NIXL_LOG_LEVEL=ERROR timeout 60 "$folder/venv/bin/python" look.py "$mode") >"$folder/$mode.txt"
    echo "progress: $mode"
    cat "$folder/$mode.txt"
done
if grep -q 'asleep [01]\.' "$folder/none.txt" || grep -q 'asleep [2-9]\.' "$folder/thread.txt"; then
    echo "Not as described." >&2
    exit 1
fi
