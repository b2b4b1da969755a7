"""Hosts on one machine: network namespaces, each with a shaped link to a bridge, and ranks that run in them (root)."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from types import TracebackType

from tests.ranks.pool import RankPool

INTERFACE = "eth0"
CLONE_NEWNET = 0x40000000
"""The kind of namespace that `setns` enters (`sched.h`)."""

_NUMBERS = itertools.count()


def unavailable() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs iproute2 for network namespaces"
    return None


class Network:
    """`num_hosts` namespaces at 10.79.0.1, 10.79.0.2, ..., whose links carry `mbit` per second each way.

    None is no limit but the machine's own. Those of hosts in `other_mbit` carry as much as it says.
    """

    def __init__(self, num_hosts: int, mbit: int | None = 1000, other_mbit: Mapping[int, int] | None = None) -> None:
        name = f"refit{os.getpid()}-{next(_NUMBERS)}"
        self.hosts = [f"{name}-{number}" for number in range(num_hosts)]
        self._bridge = f"{name}-bridge"  # a namespace too, so that nothing is left on the machine's own network
        self._mbit = dict.fromkeys(range(num_hosts), mbit) | dict(other_mbit or {})

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _make(self) -> None:
        _ip("netns", "add", self._bridge)
        self._in_bridge("link", "add", "br0", "type", "bridge")
        self._in_bridge("link", "set", "br0", "up")
        for number, host in enumerate(self.hosts):
            port = f"port{number}"
            _ip("netns", "add", host)
            _ip("link", "add", INTERFACE, "netns", host, "type", "veth", "peer", "name", port, "netns", self._bridge)
            _ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", INTERFACE)
            for link in (INTERFACE, "lo"):
                _ip("-n", host, "link", "set", link, "up")
            self._in_bridge("link", "set", port, "master", "br0", "up")
            rate = self._mbit[number]
            if rate is not None:
                self._shape(host, INTERFACE, rate)  # what it sends
                self._shape(self._bridge, port, rate)  # what it receives

    @staticmethod
    def _shape(namespace: str, link: str, mbit: int) -> None:
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
        _run("tc", "-n", namespace, "qdisc", "add", "dev", link, *shape)

    def _in_bridge(self, *words: str) -> None:
        _ip("-n", self._bridge, *words)

    def close(self) -> None:
        for namespace in (*self.hosts, self._bridge):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)

    def address(self, host: int) -> str:
        return f"10.79.0.{host + 1}"

    def set_link(self, host: int, *, up: bool) -> None:
        """Connect the host to the others, or cut it off. Its own interface stays up, as with a cable unplugged behind a
        switch."""
        self._in_bridge("link", "set", f"port{host}", "up" if up else "down")

    def counters(self) -> list[tuple[int, int]]:
        """Bytes that the interface of each host has sent and received."""
        found = []
        for host in self.hosts:
            (link,) = json.loads(_ip("-n", host, "-s", "-j", "link", "show", "dev", INTERFACE))
            found.append((link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]))
        return found

    def ranks(self, ranks_per_host: int) -> RankPool:
        """Ranks that fill the hosts in order. Stop them before the network is closed."""

        def enter(rank: int) -> None:
            enter_namespace(self.hosts[rank // ranks_per_host])
            os.environ.update(GLOO_SOCKET_IFNAME=INTERFACE, LOCAL_WORLD_SIZE=str(ranks_per_host))
            # All have one kernel, by which UCX would copy from one host's process to another's.
            os.environ.update(UCX_TLS="tcp,self", UCX_NET_DEVICES=INTERFACE)

        return RankPool(ranks_per_host * len(self.hosts), enter, in_file=True)


def enter_namespace(name: str) -> None:
    """Move this thread, and those that it starts, into a namespace. A process with one thread moves as a whole."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}", "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
