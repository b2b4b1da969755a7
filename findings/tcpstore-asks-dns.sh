#!/usr/bin/env bash
# torch 2.13.0: the first TCPStore connection of a process asks the name server who 127.0.0.1 is, although
# the address is numeric and /etc/hosts has it. Needs root, iproute2 and unshare (util-linux), on Linux with IPv6.
#
# The client connects to 127.0.0.1 as ::ffff:127.0.0.1 and looks up the name of that address for its log. The files of
# the resolver do not match an IPv4-mapped address, so glibc asks DNS for 1.0.0.127.in-addr.arpa. Where the name server
# does not answer (a cluster's internal network, a container without one), a rank waits for the resolver's timeouts:
# 10.1 s seen, 5.0 s where one question of two is lost. Nothing but a warning afterwards says so ("The hostname of the
# client socket cannot be retrieved"). A line `::ffff:127.0.0.1 localhost` in /etc/hosts ends it: 0.0 s, no question.
#
# Fails (exit code 1) once there is no question without that line, or one with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet numpy
cat >"$folder/look.py" <<'PYTHON'
"""A name server that notes questions and does not answer; then a store. Prints seconds and questions."""
import socket
import threading
import time

from torch.distributed import TCPStore

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
asked = []


def name(packet):
    labels, place = [], 12  # behind the header, each label begins with its length
    while packet[place]:
        labels.append(packet[place + 1 : place + 1 + packet[place]].decode())
        place += packet[place] + 1
    return ".".join(labels)


def listen():
    while True:
        asked.append(name(server.recvfrom(512)[0]))


threading.Thread(target=listen, daemon=True).start()
begin = time.monotonic()
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
store.set("key", "value")
seconds = time.monotonic() - begin
print(f"{seconds:.1f} s, asked: {', '.join(sorted(set(asked))) or 'nothing'}")
PYTHON
cat >"$folder/inside.sh" <<'SHELL'
set -euo pipefail
ip link set lo up
printf 'nameserver 127.0.0.1\n' >"$1/resolv.conf"
mount --bind "$1/resolv.conf" /etc/resolv.conf
printf '127.0.0.1 localhost\n' >"$1/hosts"
mount --bind "$1/hosts" /etc/hosts
"$1/venv/bin/python" "$1/look.py" >"$1/without.txt"
printf '::ffff:127.0.0.1 localhost\n' >>"$1/hosts"
"$1/venv/bin/python" "$1/look.py" >"$1/with.txt"
SHELL
unshare --net --mount bash "$folder/inside.sh" "$folder"
echo "/etc/hosts with 127.0.0.1:                  $(cat "$folder/without.txt")"
echo "/etc/hosts with ::ffff:127.0.0.1 beside it: $(cat "$folder/with.txt")"
if ! grep -q 'asked: 1.0.0.127.in-addr.arpa$' "$folder/without.txt" || ! grep -q 'asked: nothing$' "$folder/with.txt"; then
    echo "Not as described." >&2
    exit 1
fi
