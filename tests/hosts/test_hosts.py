"""Refits between hosts that are network namespaces: bytes cross as planned, and links and hosts fail.

The interfaces' own counters say what crossed. The kernel's headers, and the suite's barriers and gathered samples, come
on top of the plan's bytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from refit.bench.launcher import load_libraries
from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.config.relay import Relay
from refit.errors import RefitError
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import Sharding
from refit.predict.relays import Relaying
from refit.predict.sides import plan_sides, predict_sides
from refit.report.refits.warnings import of_engine
from refit.results.refit import RefitResult
from refit.transport.base import TransportOptions, get_transport
from refit.transport.ranks import Ranks
from tests.bench.test_runner import run_scenario
from tests.hosts.network import INTERFACE, Network
from tests.plan.test_relay import between
from tests.ranks.pool import RankError, RankPool
from tests.transport.synthetic import fill, memory_of, poison, wrong_tensors
from tests.transport.test_schedule import on, tensors

ROOT = Path(__file__).resolve().parent.parent.parent
REFITS = 2
RUN = ["--refit-method=gloo", f"--num-benchmark-iterations={REFITS}", "--num-benchmark-warmup=0"]
QWEN = ["--model=tiny_qwen3_moe", *RUN]
VLLM = ["--rl-inference-format=vllm", "--rl-inference-tensor-model-parallel-size=1"]
EP4 = ["--source-world-size=4", "--expert-model-parallel-size=4"]

OVERHEAD = 0.08
"""Most that headers and acknowledgements add to the bytes of a link."""

CONTROL_BYTES = 2 << 20
"""Most that barriers, gathered samples and meeting take of a link in a run."""


@dataclass(frozen=True)
class Hosts:
    network: Network
    ranks: RankPool
    ranks_per_host: int


def hosts(
    num_hosts: int, ranks_per_host: int, mbit: int = 1000, other_mbit: dict[int, int] | None = None
) -> Iterator[Hosts]:
    with Network(num_hosts, mbit, other_mbit) as network:
        ranks = network.ranks(ranks_per_host)
        try:
            yield Hosts(network, ranks, ranks_per_host)
        finally:
            ranks.stop()


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Hosts]:
    yield from hosts(2, 4)


@pytest.fixture(scope="module")
def five_hosts() -> Iterator[Hosts]:
    yield from hosts(5, 2)


def planned(flags: list[str], ranks_per_host: int, num_hosts: int) -> np.ndarray:
    """Bytes that a refit sends from each host to each other, `[num_hosts, num_hosts]`."""
    scenario = parse(flags).scenario
    assert scenario.model is not None
    source, destination = predict_sides(scenario.model, scenario.source, scenario.destination)
    relaying = Relaying(scenario.relay)
    plan = plan_sides(source, destination, scenario.destination, ranks_per_host, relaying=relaying).plan
    found = between(plan, ranks_per_host)
    return np.pad(found, (0, num_hosts - len(found)))


def refit(on_hosts: Hosts, flags: list[str]) -> RefitResult:
    """A verified refit of these flags, whose bytes have crossed each interface as planned."""
    num_hosts = len(on_hosts.network.hosts)
    load_libraries(parse(flags).scenario)
    before = np.array(on_hosts.network.counters())
    answers = on_hosts.ranks.run(run_scenario, flags)
    crossed = np.array(on_hosts.network.counters()) - before
    result = answers[0].measurements["refit"]
    assert isinstance(result, RefitResult)
    engine = result.engines["refit"]
    assert (engine.status, engine.num_wrong) == ("ok", 0)
    assert engine.num_compared > 0
    expected = REFITS * planned(flags, on_hosts.ranks_per_host, num_hosts)
    for host in range(num_hosts):
        sent, received = int(expected[host].sum()), int(expected[:, host].sum())
        for found, plan in zip(crossed[host].tolist(), (sent, received), strict=True):
            # Acknowledgements of what the other way carries count too.
            assert plan <= found <= plan + OVERHEAD * (sent + received) + CONTROL_BYTES, (host, crossed, expected)
    assert result.hosts is not None
    assert result.hosts.between_bytes * REFITS == expected.sum()
    assert len(result.hosts.num_ranks) == num_hosts
    return result


def crossed_bytes(result: RefitResult) -> tuple[int, int]:
    """What the plan has cross between hosts, and what crosses in every plan."""
    assert result.hosts is not None
    return result.hosts.between_bytes, result.hosts.least_bytes


@pytest.mark.megatron
def test_a_data_parallel_engine_gets_each_byte_once(two_hosts: Hosts) -> None:
    flags = [*QWEN, *EP4, *VLLM, "--rl-inference-data-parallel-size=4"]
    direct, least = crossed_bytes(refit(two_hosts, flags))
    assert direct > 2.5 * least
    assert crossed_bytes(refit(two_hosts, [*flags, "--refit-relay=node"])) == (least, least)


@pytest.mark.megatron
@pytest.mark.parametrize("relay", ["off", "node"])
def test_shared_memory_within_hosts_and_gloo_between(two_hosts: Hosts, relay: str) -> None:
    flags = [*QWEN, *EP4, *VLLM, "--rl-inference-data-parallel-size=4", f"--refit-relay={relay}"]
    result = refit(two_hosts, [*flags, "--refit-method=shm+gloo"])
    assert result.hosts is not None
    assert (result.hosts.within_bytes > 0) == (relay == "node")
    engine = result.engines["refit"]
    assert engine.transport == ("shm+gloo" if relay == "off" else "shm+gloo with relay node")
    assert all({"shm", "gloo"} <= sample.phases_s.keys() for sample in engine.samples)
    assert any(sample.phases_s["gloo"] > 0 for sample in engine.samples)


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [[], ["--rl-inference-dtype=fp8-block"]], ids=["bf16", "fp8"])
def test_changes_cross_once_and_are_passed_on(two_hosts: Hosts, dtype: list[str]) -> None:
    """The first refit sends everything, the second one what has changed: with 1 % of BF16 weights a few per cent."""
    flags = [*QWEN, *EP4, *VLLM, "--rl-inference-data-parallel-size=4", "--refit-relay=node", *dtype]
    flags += ["--refit-encoding=delta", "--refit-engine=refit"]
    flags += ["--num-benchmark-warmup=1", "--num-benchmark-iterations=1"]
    load_libraries(parse(flags).scenario)
    before = np.array(two_hosts.network.counters())
    result = two_hosts.ranks.run(run_scenario, flags)[0].measurements["refit"]
    crossed = int((np.array(two_hosts.network.counters()) - before)[0, 0])
    engine = result.engines["refit"]
    assert (engine.status, engine.num_wrong) == ("ok", 0)
    between_bytes, least = crossed_bytes(result)
    assert between_bytes == least
    most = 2.0 if dtype else 1.1  # a change can move the scale of a block, and all its codes
    assert least < crossed < most * (1 + OVERHEAD) * least + CONTROL_BYTES
    assert [sample.delta.num_full > 0 for sample in engine.samples] == [True, False]


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("relay", ["off", "node", "engine", "auto"])
def test_four_engines_on_one_host(two_hosts: Hosts, relay: str) -> None:
    result = refit(two_hosts, [*QWEN, *EP4, *VLLM, "--rl-inference-replicas=4", f"--refit-relay={relay}"])
    between_bytes, least = crossed_bytes(result)
    assert between_bytes == (4 * least if relay == "off" else least)
    assert result.hosts is not None
    assert result.hosts.relay == ("node" if relay == "auto" else relay)


FORMATS = {
    "megatron to megatron": ["--expert-model-parallel-size=2", "--source-world-size=4", "--destination-world-size=4"],
    "fsdp2 to vllm": ["--source-format=fsdp2", "--source-world-size=4", *VLLM, "--rl-inference-data-parallel-size=4"],
    "megatron to autotp": [
        *EP4,
        "--rl-inference-format=autotp",
        "--rl-inference-tensor-model-parallel-size=2",
        "--destination-world-size=4",
    ],
    "fp8": [*EP4, *VLLM, "--rl-inference-data-parallel-size=4", "--rl-inference-dtype=fp8-block"],
    "fp8 at the destination": [
        *EP4,
        *VLLM,
        "--rl-inference-data-parallel-size=4",
        "--rl-inference-dtype=fp8-block",
        "--quantise=destination",
    ],
}


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("formats", FORMATS)
def test_formats_cross_once(two_hosts: Hosts, formats: str) -> None:
    flags = [*QWEN, *FORMATS[formats]]
    direct, least = crossed_bytes(refit(two_hosts, flags))
    assert direct > 1.3 * least
    assert crossed_bytes(refit(two_hosts, [*flags, "--refit-relay=node"])) == (least, least)


@pytest.mark.megatron
@pytest.mark.slow
def test_engines_on_hosts_of_their_own_pass_on_what_leaves_the_source_once(five_hosts: Hosts) -> None:
    flags = [*QWEN, "--source-world-size=2", "--expert-model-parallel-size=2", *VLLM]
    flags += ["--rl-inference-data-parallel-size=2", "--rl-inference-replicas=4"]
    results = {relay: refit(five_hosts, [*flags, f"--refit-relay={relay}"]) for relay in ("off", "node", "engine")}
    (direct, least), node, engine = (crossed_bytes(result) for result in results.values())
    assert direct > least
    assert node == engine == (least, least)
    # With "engine" the source sends a quarter of what it sends else.
    sent = {relay: planned([*flags, f"--refit-relay={relay}"], 2, 5)[0].sum() for relay in results}
    assert sent["node"] == least
    assert 4 * sent["engine"] == pytest.approx(least)


@pytest.mark.megatron
@pytest.mark.slow
def test_ranks_of_a_job_that_has_nothing_to_relay(two_hosts: Hosts) -> None:
    one_rank = ["--rl-inference-expert-model-parallel-size=1", "--destination-world-size=1", "--refit-relay=node"]
    with pytest.raises(RankError, match=r"--refit-relay node: none of 21 tensors goes to 2 ranks of a host"):
        two_hosts.ranks.run(run_scenario, [*QWEN, *EP4, *one_rank])


@pytest.mark.megatron
@pytest.mark.slow
def test_shared_memory_is_refused_between_namespaces(two_hosts: Hosts) -> None:
    """Both have one /dev/shm, so that it would work here, and nowhere else."""
    result = two_hosts.ranks.run(run_scenario, [*QWEN, *EP4, "--refit-method=shm"])[0].measurements["refit"]
    engine = result.engines["refit"]
    assert engine.status == "waived"
    assert re.match(r"shm needs all ranks on one host, these are on 2 \(.* in network namespace", engine.reason)


def _torchrun(network: Network, host: int, flags: list[str], program: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Two ranks on `host`, of benchmark_refit.py or another program."""
    command = ["ip", "netns", "exec", network.hosts[host], sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    command += [f"--node-rank={host}", "--nproc-per-node=2", f"--master-addr={network.address(0)}"]
    command += ["--master-port=29511", *(program or (str(ROOT / "benchmark_refit.py"),)), *flags]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
def test_torchrun_on_two_hosts(tmp_path: Path) -> None:
    flags = [*QWEN, "--source-world-size=2", "--expert-model-parallel-size=2", *VLLM, f"--output-dir={tmp_path}"]
    flags += ["--rl-inference-data-parallel-size=2", "--refit-relay=node", "--run-name=two"]
    with Network(2) as network:
        outputs = on_both(network, flags)
    assert re.search(r"^# 2 hosts: .* between them, .* within, relay node; ", outputs[0], re.MULTILINE)
    assert "PASSED (refit)" in outputs[0]
    hosts = json.loads((tmp_path / "two.json").read_text())["measurements"]["refit"]["hosts"]
    assert sorted(hosts["num_ranks"].values()) == [2, 2]
    assert hosts["between_bytes"] == hosts["least_bytes"] > 0


def on_both(network: Network, flags: list[str], program: tuple[str, ...] = ()) -> list[str]:
    """What two ranks on each of two hosts print, started with torchrun. They end with 0."""
    processes = [_torchrun(network, number, flags, program) for number in range(2)]
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_links_are_calibrated_and_runs_say_how_far_their_bound_was(tmp_path: Path) -> None:
    mbit, path = 200, tmp_path / "shaped.yaml"
    flags = [*QWEN, "--source-world-size=2", "--expert-model-parallel-size=2", *VLLM, f"--output-dir={tmp_path}"]
    flags += ["--rl-inference-data-parallel-size=2", f"--cluster={path}"]
    with Network(2, mbit) as network:
        calibrate = ["calibrate", f"--output={path}", "--mib=4", "--times=1"]
        on_both(network, calibrate, ("-m", "refit"))
        outputs = on_both(network, flags)
    cluster, limit = load_cluster(str(path)), 1e6 * mbit / 8
    assert cluster.inter_bytes_per_s is not None
    # Both ranks of a host share its link. What a link lets pass at once at first is the rest.
    assert 0 < 2 * cluster.inter_bytes_per_s < 1.1 * limit
    assert cluster.gpus_per_node == 2
    line = re.search(r"^Links as measured on .* \(shaped\): the median of .* is ([\d.]+) x the lower", outputs[0], re.M)
    assert line is not None, outputs[0]
    assert float(line[1]) > 0


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("relay", ["off", "node"])
def test_a_slow_host_is_named(relay: str) -> None:
    """Of three hosts, the link of the last carries a twentieth."""
    flags = [*QWEN, "--source-world-size=2", "--expert-model-parallel-size=2", *VLLM, f"--refit-relay={relay}"]
    flags += ["--rl-inference-data-parallel-size=4", "--num-benchmark-iterations=3"]
    scenario = parse(flags).scenario
    load_libraries(scenario)
    for on_hosts in hosts(3, 2, other_mbit={2: 50}):
        result = on_hosts.ranks.run(run_scenario, flags)[0].measurements["refit"]
    engine = result.engines["refit"]
    assert (engine.status, engine.num_wrong) == ("ok", 0)
    assert all(sample.slowest_rank in (4, 5) for sample in engine.samples)
    slow_host = list(result.hosts.num_ranks)[2]
    (line,) = (each for each in of_engine("refit", engine, scenario, result) if "slowest" in each)
    assert re.match(f"warning: host {re.escape(slow_host)} was slowest in 3 of 3 refits, ", line)


@pytest.mark.megatron
@pytest.mark.slow
def test_two_hosts_with_links_of_different_speeds() -> None:
    """The slower link sets the time: what the faster one carries more is of no use."""
    flags = [*QWEN, *EP4, *VLLM, "--rl-inference-data-parallel-size=4", "--refit-relay=node"]
    for on_hosts in hosts(2, 4, mbit=1000, other_mbit={1: 100}):
        result = refit(on_hosts, flags)
    between_bytes, _ = crossed_bytes(result)
    least_s = 0.9 * (between_bytes - (1 << 18)) / (100e6 / 8)  # a link lets its burst pass at once
    assert all(sample.seconds > least_s for sample in result.engines["refit"].samples)


def sharded(num_ranks: int, num_layers: int) -> tuple[Sharding, Sharding]:
    """Rank 0 has what all others need."""
    whole = tensors(num_layers)
    return on({0: whole}), on(dict.fromkeys(range(1, num_ranks), whole))


def _refits(rank: int, num_refits: int, timeout_s: float, pause_s: float = 0.0) -> tuple[list[str], int]:
    """Refits of rank 0's weights to all others, relayed between hosts of two ranks."""
    ranks = Ranks.of_default_group()
    per_host = ranks.ranks_per_host
    sides = sharded(ranks.size, 512)
    plan = plan_refit(*sides, ranks_per_node=per_host, via=relay_stages(*sides, Relay.ENGINE, per_host))
    source, destination = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
    options = TransportOptions(staging_bytes=1 << 20, timeout_s=timeout_s)
    program = get_transport("gloo").prepare(plan, ranks, source, destination, options)
    wrong: list[str] = []
    for iteration in range(num_refits):
        if source is not None:
            fill(source, iteration)
        if destination is not None:
            poison(destination)
        dist.barrier()
        time.sleep(pause_s)
        try:
            program.run()
        except RefitError as error:
            return [f"{type(error).__name__}: {error}"], iteration
        if destination is not None:
            wrong += wrong_tensors(destination, plan, iteration)
    dist.barrier()
    program.close()
    return wrong, num_refits


def in_a_while(seconds: float, *steps: Any) -> threading.Thread:
    """Call each of `steps`, `seconds` after the one before."""

    def run() -> None:
        for step in steps:
            time.sleep(seconds)
            step()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.fixture
def three_hosts() -> Iterator[Hosts]:
    yield from hosts(3, 2, mbit=200)


@pytest.mark.slow
def test_a_link_that_is_down_for_seconds_delays_a_refit(three_hosts: Hosts) -> None:
    network = three_hosts.network
    thread = in_a_while(2.0, lambda: network.set_link(2, up=False), lambda: network.set_link(2, up=True))
    begin = time.monotonic()
    answers = three_hosts.ranks.run(_refits, 8, 60.0, 0.5)
    thread.join()
    assert answers == [([], 8)] * 6
    assert time.monotonic() - begin > 4.0, "the link was down in the meantime"


@pytest.mark.slow
def test_a_link_that_stays_down_is_an_error_within_the_timeout(three_hosts: Hosts) -> None:
    thread = in_a_while(3.0, lambda: three_hosts.network.set_link(2, up=False))
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        three_hosts.ranks.run(_until_it_fails, 6.0)
    thread.join()
    assert time.monotonic() - begin < 3.0 + 6.0 + 20.0
    named = set(re.findall(r"RefitError: rank (\d)", str(caught.value)))
    assert named & {"4", "5"}, str(caught.value)


@pytest.mark.slow
def test_a_host_that_is_lost_is_an_error_that_names_it(three_hosts: Hosts) -> None:
    pool = three_hosts.ranks
    thread = in_a_while(3.0, lambda: [pool.kill(rank) for rank in (4, 5)])
    with pytest.raises(RankError) as caught:
        pool.run(_until_it_fails, 30.0)
    thread.join()
    assert "rank 4: died" in str(caught.value)
    named = set(re.findall(r"RefitError: rank (\d)", str(caught.value)))
    assert named & {"4", "5"}, str(caught.value)


def _until_it_fails(rank: int, timeout_s: float) -> None:
    """Refits without a barrier between, as the group's own timeout is half an hour."""
    ranks = Ranks.of_default_group()
    per_host = ranks.ranks_per_host
    sides = sharded(ranks.size, 512)
    plan = plan_refit(*sides, ranks_per_node=per_host, via=relay_stages(*sides, Relay.NODE, per_host))
    source, destination = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
    options = TransportOptions(staging_bytes=1 << 20, timeout_s=timeout_s)
    program = get_transport("gloo").prepare(plan, ranks, source, destination, options)
    while True:
        program.run()


def _names(rank: int) -> tuple[list[str], int]:
    ranks = Ranks.of_default_group()
    return list(ranks.host_of), ranks.ranks_per_host


def test_namespaces_of_one_machine_are_hosts(three_hosts: Hosts) -> None:
    answers = three_hosts.ranks.run(_names)
    names, per_host = answers[0]
    assert answers == [(names, per_host)] * 6
    assert per_host == 2
    assert [names.index(name) // 2 for name in names] == [0, 0, 1, 1, 2, 2]
    assert len(set(names)) == 3
