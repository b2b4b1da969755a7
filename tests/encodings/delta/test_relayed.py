"""Changes that are passed on: packed once at the source, right everywhere, and built on what the last rank holds."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest

from refit.encodings.delta.cpu import CpuEncoder
from refit.encodings.delta.passing import packed_bytes, packs, reached
from refit.encodings.delta.versions import Versions
from refit.plan.planner import plan_refit
from refit.plan.relay import first_holders
from refit.results.status import Status
from tests.encodings.delta import test_refits
from tests.ranks.hosts import hosts_of
from tests.ranks.pool import RankPool
from tests.transport.test_schedule import on, tensors

QWEN = ["--model", "tiny_qwen3_moe", "--source-world-size", "2", "--expert-model-parallel-size", "2"]
QWEN += ["--rl-inference-format", "vllm", "--rl-inference-tensor-model-parallel-size", "1"]
DP4 = [*QWEN, "--rl-inference-data-parallel-size", "4", "--refit-method", "gloo"]
ENGINES = [*QWEN, "--rl-inference-data-parallel-size", "2", "--rl-inference-replicas", "3", "--refit-method", "gloo"]
AUTO = ["--refit-encoding", "auto", "--num-benchmark-warmup", "6"]
FP8 = ["--rl-inference-dtype", "fp8-block", "--hidden-size", "128", "--moe-ffn-hidden-size", "128"]


def on_hosts(rank: int, argv: list[str], ranks_per_host: int, joiner: int | None = None) -> Any:
    """`test_refits.run_scenario`, and whether this rank has packed anything. `joiner` loses its weights once."""
    begin, pack, packed = Versions.begin, CpuEncoder.pack, []

    def forgetful(self: Versions) -> None:
        if rank == joiner and self.version == 1:
            self.weights.forget("it has joined")
        begin(self)

    def counted(self: Any, *args: Any) -> None:
        packed.append(self)
        pack(self, *args)

    with (
        hosts_of(rank, ranks_per_host),
        mock.patch.object(Versions, "begin", forgetful),
        mock.patch.object(CpuEncoder, "pack", counted),
        mock.patch.object(test_refits, "FLAGS", test_refits.FLAGS[-4:]),
    ):
        return test_refits.run_scenario(rank, argv, model=())[:2], bool(packed)


@pytest.mark.one_megatron
@pytest.mark.one_megatron
@pytest.mark.parametrize(
    ("flags", "ranks_per_host"),
    [
        ([*DP4, "--refit-relay", "node"], 2),
        pytest.param([*DP4, "--refit-relay", "node", *FP8], 2, marks=pytest.mark.slow),
        pytest.param([*ENGINES, "--refit-relay", "engine"], 2, marks=pytest.mark.slow),
        pytest.param([*DP4, "--refit-relay", "node", "--refit-mode", "collocated"], 2, marks=pytest.mark.slow),
        pytest.param([*DP4, "--refit-relay", "node", *AUTO], 2, marks=pytest.mark.slow),
    ],
    ids=["node", "fp8", "engine", "collocated", "auto"],
)
def test_changes_are_packed_once_and_passed_on(ranks: RankPool, flags: list[str], ranks_per_host: int) -> None:
    answers = ranks.run(on_hosts, flags, ranks_per_host)
    result, output = answers[0][0]
    engine, hosts = result.refit.engines["refit"], result.refit.hosts
    assert (result.exit_code, engine.status, engine.num_wrong) == (0, Status.OK, 0), output
    assert hosts.relay == flags[flags.index("--refit-relay") + 1]
    assert hosts.between_bytes == hosts.least_bytes < hosts.direct_bytes
    first, *later = engine.samples
    assert first.sent_bytes > 0.99 * result.refit.plan.wire_bytes
    most = 1.01 if "fp8-block" in flags else 0.1
    assert "auto" in flags or all(sample.sent_bytes < most * first.sent_bytes for sample in later)
    # Ranks that only pass on pack nothing, and keep no snapshot.
    source = result.scenario.source.ranks
    assert [packed for _, packed in answers][: len(source)] == [True] * len(source)
    if "collocated" not in flags:
        assert not any(packed for _, packed in answers[len(source) :])


@pytest.mark.one_megatron
def test_a_joiner_behind_a_relay_gets_everything(ranks: RankPool) -> None:
    result, output = ranks.run(on_hosts, [*DP4, "--refit-relay", "node"], 2, 5)[0][0]
    engine = result.refit.engines["refit"]
    assert (engine.status, engine.num_wrong) == (Status.OK, 0), output
    assert [sample.delta.num_full > 0 for sample in engine.samples] == [True, True, False, False]
    assert engine.samples[1].delta.full_because.endswith("rank 5: it has joined")


def test_a_relay_that_changes_what_it_passes_on_is_found(ranks: RankPool) -> None:
    result, _ = ranks.run(damaging, [*DP4, "--refit-relay", "node"])[0][0]
    assert result.refit.engines["refit"].status is Status.WRONG_DATA


def damaging(rank: int, argv: list[str]) -> Any:
    """Rank 2 flips a bit of the values of all that it passes on."""
    from refit.transport.kept import KeptMessage

    put = KeptMessage.put

    def flipped(self: KeptMessage, payload: Any, length: Any) -> None:
        put(self, payload, length)
        assert self.payload is not None
        self.payload[-1] ^= 1

    damaged = mock.patch.object(KeptMessage, "put", flipped) if rank == 2 else contextlib.nullcontext()
    with damaged:
        return on_hosts(rank, argv, 2)


def test_all_ranks_behind_a_source_are_asked_what_they_hold() -> None:
    """0 sends to 1, which passes on to 2 and 3; 4 sends to 5 alone."""
    whole, other = tensors(3), tensors(5)[3:]
    source, destination = on({0: whole, 4: other}), on({1: whole, 2: whole, 3: whole, 5: other})
    plan = plan_refit(source, destination, via=[first_holders(source, destination, lambda shard: [shard.ranks[0]])])
    assert reached(plan, 0) == [1, 2, 3]
    assert reached(plan, 4) == [5]
    assert [rank for rank in plan.ranks if packs(plan, rank)] == [0, 4]
    nbytes = sum(box.volume * spec.itemsize for spec, box in whole)
    assert packed_bytes(plan).tolist()[:4] == [nbytes, 0, 0, 0]
