"""Results and sweeps with figures of choice, and the files that runs leave of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from refit.config.layout import Layout
from refit.config.scenario import Mode, Scenario
from refit.config.shape import Experts, ModelShape
from refit.config.side import SideSpec
from refit.plan.cost import Bound, Cost
from refit.results.refit import EngineResult, ModelFacts, RefitResult, Sample
from refit.results.result import Environment, Gpu, Result, encoded
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.sweep import Planned, Sweep, sweep_file

ENVIRONMENT = Environment(
    command="benchmark_refit.py --model tiny",
    versions={"python": "3.12.3", "torch": "2.11.0", "megatron-core": "0.19.2"},
    host="node001",
    gpus=(Gpu("NVIDIA H100 80GB HBM3"),) * 8,
    variables={"NCCL_NVLS_ENABLE": "0", "SLURM_JOB_ID": "9876543"},
)


MODEL = ModelShape(
    num_layers=2,
    hidden_size=256,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    ffn_hidden_size=1024,
    vocab_size=512,
    make_vocab_size_divisible_by=128,
    max_position_embeddings=512,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    add_qkv_bias=False,
    tied_embeddings=False,
    qk_layernorm=False,
    mla=None,
    experts=Experts(
        num_experts=8,
        topk=2,
        ffn_hidden_size=256,
        shared_ffn_hidden_size=None,
        layers=(False, True),
        expert_bias=False,
        grouped_gemm=True,
    ),
)


def side(tp: int, ep: int, etp: int | None = None, pp: int = 1) -> SideSpec:
    """A side on ranks from 0 on, without data parallelism."""
    return SideSpec(Layout(tp, ep, etp or tp, pp, tp * ep * pp))


def on_ranks_from(first_rank: int, side: SideSpec) -> SideSpec:
    return replace(side, layout=replace(side.layout, first_rank=first_rank))


def cost(
    sent: Mapping[int, int],
    received: Mapping[int, int],
    payload: int = 2_000_000_000,
    local: int = 0,
    num_transfers: int = 12,
    digest: str = "",
) -> Cost:
    """A plan's cost. Its wire bytes are `payload` less `local`, whatever the ranks' bytes add up to."""
    return Cost(
        payload_bytes=payload,
        wire_bytes=payload - local,
        local_bytes=local,
        num_transfers=num_transfers,
        sent_by_rank=dict(sent),
        received_by_rank=dict(received),
        local_by_rank=dict.fromkeys(received, 0),
        source_weights_by_rank=dict.fromkeys(sent, 0),
        destination_weights_by_rank=dict.fromkeys(received, 0),
        digest=digest,
        casts={},
    )


def planned(
    name: str,
    source: SideSpec | None = None,
    destination: SideSpec | None = None,
    mode: str = "non-collocated",
    method: str = "nvshmem",
    **changes: Any,
) -> Planned:
    """A scenario of a sweep that is ready to run, with `changes` of its fields."""
    source, destination = source or side(8, 8), destination or side(8, 4)
    apart = mode == "non-collocated"
    destination = on_ranks_from(source.world_size if apart else 0, destination)
    num_ranks = max(source.ranks.stop, destination.ranks.stop)
    values: dict[str, Any] = {
        "flags": ("--model", "tiny"),
        "num_ranks": num_ranks,
        "nodes": -(-num_ranks // 8),
        "ranks_per_node": min(8, num_ranks),
        "status": Status.READY,
        "cost": cost({0: 0}, {64: 65_930_000_000}),
    }
    return Planned(name=name, source=source, destination=destination, mode=mode, method=method, **(values | changes))


def sample(
    seconds_per_rank: Sequence[float],
    iteration: int = 0,
    *,
    warmup: bool = False,
    num_compared: int = 100,
    num_wrong: int = 0,
) -> Sample:
    """One refit, three quarters of it on the wire."""
    longest = max(seconds_per_rank)
    return Sample(
        iteration=iteration,
        warmup=warmup,
        seconds_per_rank=tuple(seconds_per_rank),
        slowest_rank=list(seconds_per_rank).index(longest),
        phases_s={"wire": 0.75 * longest},
        unattributed_s=0.0,
        num_compared=num_compared,
        num_wrong=num_wrong,
    )


def engine(measured: Sequence[Sequence[float]], num_warmup: int = 2) -> EngineResult:
    """An engine with one list of seconds per rank for each measured refit."""
    warm = [sample(measured[0], number, warmup=True) for number in range(num_warmup)]
    samples = warm + [sample(seconds, number) for number, seconds in enumerate(measured, num_warmup)]
    return EngineResult(
        status=Status.OK,
        cold_s={"plan": 0.125, "prepare": 0.25, "first": 0.5},
        samples=tuple(samples),
        summary=summarise([max(seconds) for seconds in measured]),
        bottleneck_gb_per_s=355.8,
        staging_bytes_per_rank=(512 << 20,) * 8,
    )


def timed(samples_s: Sequence[float], *, num_wrong: int = 0, gb_per_s: float | None = 48.1) -> EngineResult:
    """An engine by the slowest rank's seconds, after one warm-up refit twice as long as the first measured one."""
    times = [(True, 2 * samples_s[0]), *((False, seconds) for seconds in samples_s)]
    return EngineResult(
        status=Status.WRONG_DATA if num_wrong else Status.OK,
        samples=tuple(
            sample((seconds / 2, seconds), number, warmup=warmup, num_compared=1_000_000, num_wrong=num_wrong)
            for number, (warmup, seconds) in enumerate(times)
        ),
        summary=summarise(samples_s),
        bottleneck_gb_per_s=gb_per_s,
    )


def scenario(entry: Planned) -> Scenario:
    """What a run of `entry` was asked for."""
    assert entry.source is not None
    assert entry.destination is not None
    return Scenario(
        model=MODEL,
        source=entry.source,
        destination=entry.destination,
        mode=Mode(entry.mode),
        method=entry.method,
        model_name="kimi_k2",
    )


def result(
    entry: Planned,
    samples_s: Sequence[float] = (0.0449, 0.0452, 0.0456),
    *,
    payload: int = 2_051_970_000_000,
    local: int = 0,
    busiest: int = 65_930_000_000,
    num_transfers: int = 38_000,
    bound_s: float | None = None,
    engines: Mapping[str, EngineResult] | None = None,
    baseline: EngineResult | None = None,
    plan: Cost | None = None,
    **changes: Any,
) -> Result:
    """The result of a scenario that went well, with `changes` of its fields. Sent and received bytes are uneven."""
    ran = scenario(entry)
    received = {rank: busiest // (1 + number % 2) for number, rank in enumerate(ran.destination.ranks)}
    sent = {rank: busiest // (2 + rank % 2) for rank in ran.source.ranks}
    if engines is None:
        engines = {"refit": timed(samples_s), **({"megatron": baseline} if baseline else {})}
    measured = RefitResult(
        status=changes.get("status", Status.OK),
        model=ModelFacts(1_026_000_000_000, 1000, ("bfloat16",)),
        plan=plan or cost(sent, received, payload, local, num_transfers),
        bound=Bound("h100_ib400", bound_s, "rank 64 receives 65.93 GB at 50 GB/s") if bound_s else None,
        engines=moved_by(engines, entry.method),
    )
    values: dict[str, Any] = {
        "status": Status.OK,
        "exit_code": 0,
        "started": "2026-01-26T15:30:00+00:00",
        "world_size": entry.num_ranks,
        "device": "cuda",
        "environment": ENVIRONMENT,
        "scenario": ran,
        "measurements": {"refit": measured},
    }
    return Result(entry.name, **(values | changes))


def moved_by(engines: Mapping[str, EngineResult], method: str) -> dict[str, EngineResult]:
    """Engines whose bytes `method` moved, but for those that name another transport."""
    return {name: replace(each, transport=each.transport or method) for name, each in engines.items()}


def small_run(**engines: EngineResult) -> Result:
    """A run of TP2 EP2 -> TP2 EP1 on eight ranks, of which two are idle."""
    entry = planned("run", side(2, 2), side(2, 1))
    measured = RefitResult(
        model=ModelFacts(1000, 10, ("bfloat16",)),
        plan=cost(
            sent=dict.fromkeys(range(4), 7_500_000_000),
            received={4: 15_000_000_000, 5: 15_000_000_000},
            payload=30_000_000_000,
            digest="0123456789abcdef",
        ),
        bound=Bound("h200_nvlink", 0.0384, "rank 4 receives 15.00 GB ..."),
        engines=moved_by(engines, entry.method),
    )
    environment = Environment(versions={"torch": "2.11.0"}, host="node1", gpus=(Gpu("NVIDIA H200"),) * 8)
    return result(entry, world_size=8, environment=environment, measurements={"refit": measured})


def sweep_of(entries: Sequence[Planned], run_id: str = "20260126-153000_9876543") -> Sweep:
    return Sweep(run_id, "Kimi K2", "2026-01-26 15:30:00", ("9876543",), 16, 128, 8, "h100_ib400", tuple(entries))


def write_result(path: Path, content: Result) -> None:
    path.write_text(encoded(content), encoding="utf-8")


def write_run(directory: Path, sweep: Sweep, results: Mapping[str, Result | None]) -> Path:
    """The sweep file, and for each named scenario a log and, unless None, a result. Returns the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    sweep.write(sweep_file(directory, sweep.run_id))
    for name, content in results.items():
        stem = f"{sweep.run_id}_{name}"
        (directory / f"{stem}.log").write_text("a line\n")
        if content is not None:
            write_result(directory / f"{stem}.json", content)
    return directory
