"""Estimates with the filling of the pipeline: what the steps of the messages add up to, and what was measured."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from refit.cli.parsing import parse
from refit.config.clusters import Cluster
from refit.config.registry import METHODS
from refit.config.relay import Relay
from refit.plan.cost import bytes_matrix, lower_bound
from refit.plan.estimate import LAG, MessageSize, estimate_s, filling_s, rounds_of
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.relays import message_size
from refit.transport.messages import Framing
from refit.transport.one_sided import shm
from refit.transport.two_sided.gloo import GlooBackend
from refit.transport.two_sided.nccl import NcclBackend
from tests.transport.test_schedule import channels, on, tensors

ALONE = Cluster("alone", 1e9, 1e8, 1, None, None, None, "")
"""Each rank is a node."""

FIVE_HOSTS = (
    "--model=tiny_qwen3_moe --hidden-size=1024 --num-attention-heads=16 --kv-channels=64 --moe-ffn-hidden-size=1024 "
    "--vocab-size=22528 --refit-method=gloo --rl-inference-format=vllm --rl-inference-tensor-model-parallel-size=1 "
    "--rl-inference-replicas=4 --dry-run"
)
"""Of `benchmarks.hosts`, with what it measured: bytes per second of a pair, and seconds
(docs/measurements/2026-11-two-cores-by-topic.md)."""

PAIR_BYTES_PER_S, MEASURED_S = 119.7e6, 1.952


def test_it_predicts_what_was_measured_on_five_hosts() -> None:
    cluster = Cluster("measured", 1e9, PAIR_BYTES_PER_S, 1, None, None, None, "")
    scenario = parse([*FIVE_HOSTS.split(), "--refit-relay=engine"]).scenario
    run = dry_run(scenario, DryRunOptions(None, 1, cluster))
    assert run.bound is not None
    assert run.estimate_s is not None
    assert run.bound.seconds < run.estimate_s
    assert run.estimate_s == pytest.approx(MEASURED_S, rel=0.15)
    assert dry_run(parse(FIVE_HOSTS.split()).scenario, DryRunOptions(None, 1, cluster)).estimate_s is None


@pytest.mark.parametrize("num_engines", [2, 4])
def test_it_is_the_time_of_all_steps_of_the_messages(num_engines: int) -> None:
    """Each step takes what its busiest rank needs to send, or receive, its messages."""
    whole = tensors(400)
    source, destination = on({0: whole}), on(dict.fromkeys(range(1, 1 + num_engines), whole))
    plan = plan_refit(source, destination, ranks_per_node=1, via=relay_stages(source, destination, Relay.ENGINE, 1))
    assert plan.num_stages == 2
    size = 1024
    sent: dict[int, Counter[tuple[str, int]]] = {}
    for channel in channels(plan, Framing(size, None)).values():
        for message in channel.messages:
            of_step = sent.setdefault(message.step, Counter())
            of_step["sends", channel.source] += message.nbytes
            of_step["receives", channel.destination] += message.nbytes
    seconds = sum(max(of_step.values()) / 1e8 for of_step in sent.values())
    bound = lower_bound(bytes_matrix(plan), ALONE)
    found = estimate_s(bound, filling_s(plan, MessageSize(size, 1 << 30), ALONE))
    assert found == pytest.approx(seconds, rel=0.05)
    assert bound is not None
    assert seconds > bound.seconds


def test_staging_bounds_what_a_rank_sends_in_a_step() -> None:
    whole = tensors(400)
    source, destination = on({0: whole}), on(dict.fromkeys(range(1, 5), whole))
    plan = plan_refit(source, destination, ranks_per_node=1, via=relay_stages(source, destination, Relay.ENGINE, 1))
    (wide,), (narrow,) = (list(rounds_of(plan, MessageSize(1024, most))) for most in (1 << 30, 1000))
    assert wide.max() == 1024
    assert max(narrow.sum(0).max(), narrow.sum(1).max()) <= 1000
    assert np.array_equal(wide > 0, narrow > 0)
    assert filling_s(plan, MessageSize(1024, 1 << 30), ALONE) == pytest.approx(LAG * wide.sum(1).max() / 1e8)


def test_the_registry_has_the_messages_of_the_transports() -> None:
    for name, backend in (
        ("gloo", GlooBackend),
        ("nccl", NcclBackend),
        ("shm+gloo", GlooBackend),
        ("cuda-ipc+nccl", NcclBackend),
    ):
        row, traits = METHODS[name], backend.traits
        assert (row.message_bytes, row.messages_per_pair) == (traits.bucket_bytes, traits.slots_per_peer)
    assert (METHODS["shm"].message_bytes, METHODS["shm"].messages_per_pair) == (shm.SLOT_BYTES, shm.SLOTS_PER_PEER)
    assert message_size("gloo", 64 << 20) == MessageSize(4 << 20, 8 << 20)
    assert message_size("auto", 64 << 20) == message_size("nccl", 64 << 20)
