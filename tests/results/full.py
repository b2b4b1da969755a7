"""A result in which no field that has a default has it, and files of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from refit.config.clusters import Cluster
from refit.config.delta import DeltaOptions, Pattern, Snapshot
from refit.config.layout import Layout
from refit.config.options import UndecodedOptions
from refit.config.placement import ExpertPlacement
from refit.config.relay import Relay
from refit.config.scenario import Mode, Scenario, Verify
from refit.config.shape import Dtype, LatentAttention
from refit.config.side import SideSpec
from refit.config.steps import Dispatch, Recompute, StepSettings
from refit.errors import UsageError
from refit.plan.cost import Bound, Cost
from refit.predict.vllm.options import VllmOptions
from refit.results.checkpoints import WriteResult
from refit.results.delta import Changed, DeltaSample
from refit.results.refit import (
    Activity,
    EngineResult,
    ForwardCheck,
    HostTraffic,
    ModelFacts,
    NotMoved,
    QuantisedRefit,
    RefitResult,
    Sample,
    WrongWeights,
)
from refit.results.result import Environment, Failure, Gpu, Result, ResultFile, read_result
from refit.results.serving import Served, ServedCheck
from refit.results.stats import stability, summarise
from refit.results.status import Status
from refit.transport.one_sided.nixl.options import NixlOptions
from refit.transport.one_sided.options import NvshmemOptions
from tests.report.factories import MODEL

GOLDEN = Path(__file__).parent / "golden"
"""Files of the first edition, and what its `refit report --format csv` printed of them."""
DELTA = DeltaSample(
    0.01, 90, 1, 4, 2, 0.01, 0.02, 0.03, 180, 1, "rank 0: nothing was sent before", {"norms": Changed(9, 1)}
)
ENGINE = EngineResult(
    status=Status.WRONG_DATA,
    reason="a reason",
    transport="nccl",
    not_moved=(NotMoved("the dtype changes", 2, 100, 200, ("a", "b")),),
    connect_s=0.5,
    connected="one NCCL communicator of 4 ranks",
    slow="TCP within a host",
    connect_memory_bytes_per_rank=(1, 2, 3),
    cold_s={"plan": 0.1, "prepare": 0.2, "first": 0.3},
    samples=(
        Sample(0, True, (0.1, 0.3, 0.2), 1, {"wire": 0.25}, 0.05, 100, 0),
        Sample(
            *(1, False, (0.1, 0.2, 0.3), 2, {"wire": 0.25, "pack": 0.01}, 0.04, 100, 7, {"quantise": 0.1}, 10, 12),
            *({"pause": 0.01, "commit": 0.02}, 90, 3, {"convert": 0.1}, DELTA),
        ),
    ),
    summary=summarise([0.3]),
    stability=stability([0.3] * 6),
    bottleneck_gb_per_s=48.1,
    share_of_lower_bound=0.5,
    wrong=(WrongWeights(1, 2, "decoder.weight", 7, (4, 0, 1), 0.25, -0.5),),
    staging_bytes_per_rank=(1, 2, 3),
    extra_memory_bytes_per_rank=(4, None, 6),
    forward=ForwardCheck(True, None, 0.75, 0.125, 25.5, 0.05),
    trained=ForwardCheck(False, None, 0.5, 0.25, 12.5),
    profile=((), (Activity(7, "kernel", 3, 0.1, 0.0, 0.2),)),
    served=Served(
        *("0.32.0", 2, ("norm",), ("embed",), ("qkv",), {"linears": 0.01}, 0.33),
        ServedCheck(False, "a reason", "transformers", 2, 110, 9, 3, 0.5, 0.25, "prompt token 2"),
    ),
    written=WriteResult("written", 12, 2, 2000, 0.5, "transformers", 1000, 7),
)
REFIT = RefitResult(
    quantised=QuantisedRefit(
        "mxfp8", "1x32", "ceil", "Megatron-Core", ("router",), 3, 4, 50, 6, {"33-column shards of 32-column blocks": 1}
    ),
    status=Status.WRONG_DATA,
    model=ModelFacts(1000, 10, ("bfloat16", "float32")),
    plan=Cost(
        payload_bytes=300,
        wire_bytes=200,
        local_bytes=100,
        num_transfers=12,
        sent_by_rank={0: 200},
        received_by_rank={1: 150, 2: 50},
        local_by_rank={1: 100, 2: 0},
        source_weights_by_rank={0: 400},
        destination_weights_by_rank={1: 250, 2: 50},
        digest="0123456789abcdef",
        casts={"router.weight": ("float32", "bfloat16")},
    ),
    bound=Bound("mine", 0.15, "rank 0 sends 200 bytes within its node at 391 GB/s"),
    estimate_s=1.5,
    floor=Bound("mine", 0.125, "the source sends 100 bytes at 50 GB/s"),
    hosts=HostTraffic({"a": 2, "b": 1}, "node", 150, 50, 120),
    start_s={"imports": 3.0, "first refit": 0.25},
    engines={"refit": ENGINE, "megatron": EngineResult(Status.WAIVED, "no")},
    rearranged=RefitResult(status=Status.OK, engines={"refit": EngineResult(Status.OK)}),
)
PLACED = VllmOptions(
    2, 3, 4, ExpertPlacement("a.json", ((0, 1), (1, 0))), ExpertPlacement("round_robin"), "a/python", 2
)
FULL = Result(
    run_id="run",
    status=Status.WRONG_DATA,
    exit_code=1,
    failure=Failure("out of memory", 3, "plan"),
    started="2026-01-26T15:30:00+00:00",
    finished="2026-01-26T15:31:00+00:00",
    world_size=4,
    device="cuda",
    scenario=Scenario(
        model=replace(MODEL, mla=LatentAttention(None, 512, 128, 64, 128)),
        source=SideSpec(Layout(1, 1, 1, 1, 1, 0)),
        destination=SideSpec(
            Layout(1, 2, 1, 1, 2, 1, 3, 4),
            dtype=Dtype.FP32,
            transformer_impl="transformer_engine",
            format="vllm",
            options=PLACED,
        ),
        mode=Mode.NON_COLLOCATED,
        method="nccl",
        engines=("refit", "megatron"),
        measurements=("refit", "later"),
        num_warmup=1,
        num_iterations=3,
        max_iterations=200,
        verify=Verify.SAMPLE,
        check_forward=True,
        profile=True,
        staging_bytes=1 << 20,
        timeout_s=30.5,
        model_name="kimi_k2",
        model_provider="a:b",
        output_dir=Path("some where/results"),
        recorded={"seq-length": 128, "data-path": ["a", "b"], "swiglu": True, "lr": 0.5, "nothing": None},
        notes=("a choice",),
        device="cuda",
        ranks_per_gpu=2,
        encoding="delta",
        delta=DeltaOptions((0.5, 0.25), Pattern.ROWS, Snapshot.HOST),
        relay=Relay.NODE,
        source_weights=Path("a model"),
        write_weights=Path("written"),
        method_options={
            "nvshmem": NvshmemOptions("direct", True),
            "nixl": NixlOptions("POSIX"),
            "later": UndecodedOptions({"depth": 3}),
        },
        cluster=Cluster("mine", 391e9, None, 8, None, 80 * 10**9, "H200", "measured"),
        run_name="run",
        steps=StepSettings(
            2, 16, 64, recompute=Recompute("selective", modules=("moe", "mlp")), dispatch=Dispatch("flex", "deepep")
        ),
    ),
    environment=Environment(
        command="benchmark_refit.py --model tiny",
        versions={"torch": "2.11.0"},
        commit="e660a99",
        host="node1",
        cpu="a CPU",
        num_cpus=8,
        memory_bytes=1 << 34,
        gpus=(Gpu("NVIDIA H200", 150 * 10**9), Gpu("NVIDIA H200")),
        variables={"NCCL_NVLS_ENABLE": "0"},
    ),
    measurements={"refit": REFIT},
)
"""A result in which no field that has a default has it."""


def written(value: Result, tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    ResultFile(path).write(value)
    return path


def error(path: Path) -> str:
    """The message of the one UsageError that reading `path` raises. It names the file and is one line."""
    with pytest.raises(UsageError) as caught:
        read_result(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message
