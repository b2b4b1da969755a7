"""Which relay a scenario gets, and what its dry run says of it."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.relay import Relay
from refit.errors import UsageError
from refit.predict.dry_run import DryRun, dry_run
from refit.report.plans.dry_run import dry_run_text

KIMI_K2 = (
    "--dry-run --model kimi_k2 --tensor-model-parallel-size 8 --expert-model-parallel-size 8 --source-world-size 64 "
    "--rl-inference-format vllm --rl-inference-tensor-model-parallel-size 1 --rl-inference-data-parallel-size 32 "
    "--cluster h100_ib400"
)
TINY = (
    "--dry-run --model tiny_qwen3_moe --source-world-size 4 --expert-model-parallel-size 4 --rl-inference-format vllm "
    "--rl-inference-tensor-model-parallel-size 1 --gpus-per-node 4"
)
DP4 = f"{TINY} --rl-inference-data-parallel-size 4"


def run(line: str) -> DryRun:
    request = parse(line.split())
    assert request.dry_run is not None
    return dry_run(request.scenario, request.dry_run)


def seconds(found: DryRun) -> float:
    assert found.bound is not None
    return found.bound.seconds


def test_kimi_k2_into_a_data_parallel_engine() -> None:
    off, node = (run(f"{KIMI_K2} --refit-relay {relay}") for relay in ("off", "node"))
    assert seconds(off) == pytest.approx(1.737, abs=1e-3)
    assert seconds(node) == pytest.approx(1.327, abs=1e-3)
    assert node.floor == off.floor is not None
    assert seconds(node) == pytest.approx(node.floor.seconds, rel=1e-4), "no plan is faster"  # type: ignore[union-attr]
    assert node.without_relay is not None
    assert node.without_relay.bound == off.bound
    assert off.without_relay is None
    assert node.traffic.sent_between.sum() == node.least_between_bytes == off.least_between_bytes
    text = dry_run_text(node)
    assert "Between nodes:              2,123.15 GB, within them 656.44 GB, relay node; in every plan" in text
    assert "Without relay:              2,779.59 GB between nodes, within them 0 bytes; lower bound 1.737 s" in text
    assert "Floor of all plans:         1.327 s: node 8 receives 530.79 GB at 400 GB/s" in text


@pytest.mark.slow
def test_kimi_k2_into_four_engines_takes_little_more_than_into_one() -> None:
    one = seconds(run(f"{KIMI_K2} --refit-relay engine"))
    four = run(f"{KIMI_K2} --rl-inference-replicas 4 --refit-relay engine")
    assert seconds(four) < 1.05 * one
    assert seconds(run(f"{KIMI_K2} --rl-inference-replicas 4 --refit-relay node")) == pytest.approx(2 * one, rel=1e-3)
    auto = run(f"{KIMI_K2} --rl-inference-replicas 4 --refit-relay auto")
    assert (auto.relay, auto.bound) == (Relay.ENGINE, four.bound)


def test_auto_takes_what_is_faster_with_or_without_a_cluster() -> None:
    assert run(f"{DP4} --refit-relay auto").relay is Relay.NODE
    assert run(f"{KIMI_K2} --refit-relay auto").relay is Relay.NODE
    # All ranks are in one NVLink domain, of two hosts.
    assert run(f"{DP4} --cluster h100_ib400 --refit-relay auto").relay is Relay.OFF
    assert run(f"{DP4} --gpus-per-node 8 --refit-relay auto").relay is Relay.OFF
    assert run(f"{TINY} --refit-relay auto").relay is Relay.OFF


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{DP4} --gpus-per-node 8 --refit-relay node", "--refit-relay node: all 8 ranks are on 1 host"),
        (f"{TINY} --refit-relay node", "--refit-relay node: none of 21 tensors goes to 2 ranks of a host that lacks"),
        (f"{TINY} --refit-relay engine", "--refit-relay engine: none of 21 tensors goes to 2 ranks, or hosts, that"),
        (f"{DP4} --measure forward --refit-relay node", "--refit-relay node needs a refit: add refit to --measure"),
        (
            "--dry-run --model tiny --refit-engine megatron --refit-relay node",
            "--refit-relay node is for this suite",
        ),
    ],
)
def test_a_relay_of_nothing_is_refused(line: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(line)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_changes_are_relayed_by_the_plan_of_the_weights() -> None:
    """What is only passed on needs no snapshot."""
    plain, changes = (run(f"{DP4} --refit-relay node {more}") for more in ("", "--refit-encoding delta"))
    assert changes.cost.digest == plain.cost.digest
    assert changes.traffic.sent_between.sum() == changes.least_between_bytes
    source = range(changes.scenario.source.world_size)
    assert set(changes.encoding_needs["snapshot"]) <= set(source)
    sent = {rank: nbytes for rank, nbytes in changes.cost.sent_by_rank.items() if rank in source and nbytes}
    assert changes.encoding_needs["snapshot"] == sent


def test_codes_and_scales_are_relayed_once_per_node() -> None:
    found = run(f"{DP4} --rl-inference-dtype fp8-block --refit-relay node")
    assert found.traffic.sent_between.sum() == found.least_between_bytes
    assert found.least_between_bytes < run(f"{DP4} --refit-relay node").least_between_bytes
