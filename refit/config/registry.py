"""Tables of what the suite supports: side formats, refit methods, encodings, model families and others.

Flags, dry runs, sweeps, runs and reports all read these tables, and nothing else lists the names. What a row says is in
`refit.config.rows`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from refit.config.options import OptionFlag, flags_of
from refit.config.rows import (
    BETWEEN,
    DATA_PARALLEL,
    WITHIN,
    Encoding,
    Engine,
    Format,
    LauncherKind,
    MeasurementKind,
    Method,
    ModelFamily,
    StepSupport,
)
from refit.errors import UsageError

Row = TypeVar("Row")


class Registry(Generic[Row]):
    """Rows by name, in the order in which users see them."""

    def __init__(self, kind: str, rows: dict[str, Row]) -> None:
        """`kind` is what a row is called in messages."""
        self._kind = kind
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Row:
        """The row of `name`. Raises UsageError, listing the known names, for an unknown one."""
        if name not in self._rows:
            raise UsageError(f"unknown {self._kind} {name!r}: choose one of {', '.join(sorted(self._rows))}")
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def items(self) -> Iterator[tuple[str, Row]]:
        return iter(self._rows.items())

    def add(self, name: str, row: Row) -> None:
        """Add a row. Raises ValueError where `name` is taken."""
        if name in self._rows:
            raise ValueError(f"{self._kind} {name!r} is registered already")
        self._rows[name] = row

    @contextmanager
    def added(self, name: str, row: Row) -> Iterator[None]:
        """Hold `row` within this context."""
        self.add(name, row)
        try:
            yield
        finally:
            del self._rows[name]


def load(reference: str) -> Any:
    """The object that `module:name` names, its module imported."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def option_flags(options: str | None) -> dict[str, OptionFlag]:
    """The flags of the settings that a row's `options` names, by field; empty for None."""
    return flags_of(load(options)) if options is not None else {}


DEFAULT_FORMAT = "megatron"
"""Of a side for which none is given; titles leave it out."""

FORMATS = Registry(
    "side format",
    {
        "megatron": Format(
            predict="refit.predict.megatron:predict",
            check="refit.predict.megatron_layout:check",
            build="refit.models.megatron.side:build_side",
            takes_provider=True,
            has_layer_specs=True,
            serving="refit.predict.serving.layout:of_megatron",
            is_reference=True,
            steps=StepSupport(
                check="refit.predict.megatron_steps:check_steps",
                memory="refit.predict.training_memory:training_memory",
            ),
            available="refit.models.megatron.dispatchers:check_available",
        ),
        "fsdp2": Format(
            predict="refit.predict.fsdp2:predict",
            check="refit.predict.fsdp2:check",
            build="refit.models.fsdp2.side:build_side",
            axes=("tp", "ep"),
            options="refit.predict.fsdp2:Fsdp2Options",
            libraries=(("transformers", "pip install 'refit-benchmark[hf]'"),),
            steps=StepSupport(
                check="refit.predict.transformers_steps:check_steps",
                memory="refit.predict.transformers_steps:fsdp2_memory",
            ),
            available="refit.models.huggingface.attention:check_available",
            note="refit.predict.families.releases:fsdp2_note",
            preload="refit.models.huggingface.model:load_family",
            words=(("FSDP", DATA_PARALLEL), ("HSDP", "replicate_size")),
        ),
        "autotp": Format(
            predict="refit.predict.autotp:predict",
            check="refit.predict.autotp:check",
            build="refit.models.autotp.side:build_side",
            axes=("tp",),
            options="refit.predict.autotp:AutotpOptions",
            libraries=tuple((name, "pip install 'refit-benchmark[autotp]'") for name in ("transformers", "deepspeed")),
            steps=StepSupport(
                check="refit.predict.transformers_steps:check_steps",
                memory="refit.predict.transformers_steps:autotp_memory",
            ),
            available="refit.models.huggingface.attention:check_available",
            note="refit.predict.families.releases:autotp_note",
            preload="refit.models.autotp.engine:load_libraries",
            words=(("DP", DATA_PARALLEL), ("ZeRO", "zero_stage")),
        ),
        "vllm": Format(
            predict="refit.predict.vllm.sharding:predict",
            check="refit.predict.vllm.sharding:check",
            build="refit.models.vllm.build:build_side",
            axes=("tp", "ep", "pp"),
            options="refit.predict.vllm.options:VllmOptions",
            destination_only=True,
            serving="refit.predict.serving.layout:of_vllm",
            searched_options=("replicas",),
            builds_codes=True,
            parts="refit.predict.vllm.parameters:parts",
            available="refit.models.vllm.engine.available:check_available",
            note="refit.predict.vllm.names:note",
            rearrange="refit.models.vllm.side:rearranged",
            words=(("DP", "data_parallel_size"), ("x", "replicas"), ("+", "num_redundant_experts")),
        ),
    },
)

AUTO = "auto"
"""As a refit method: the first row of METHODS that the machine and the scenario allow, so rows are in that order.

nixl is behind gloo, which is faster over TCP. cuda-ipc+nccl, which has run on no GPU yet, is behind nccl.
"""

METHODS = Registry(
    "refit method",
    {
        "cuda-ipc": Method(
            transport="refit.transport.one_sided.cuda_ipc:CudaIpcTransport",
            devices=("cuda",),
            needs="CUDA GPUs of one host with access to each other",
            links=(("cuda", WITHIN),),
            one_sided=True,
            single_host=True,
            cpu_stand_in="shm",
        ),
        "nvshmem": Method(
            transport="refit.transport.one_sided.nvshmem:NvshmemTransport",
            devices=("cuda",),
            needs="CUDA GPUs and nvshmem4py",
            options="refit.transport.one_sided.options:NvshmemOptions",
            messages_per_pair=2,
            one_sided=True,
            cpu_stand_in="shm",
            suggested_for=("non-collocated",),
            megatron_service="nvshmem",
        ),
        "nccl": Method(
            transport="refit.transport.two_sided.nccl:NcclTransport",
            devices=("cuda",),
            needs="CUDA GPUs",
            links=(("cuda", BETWEEN),),
            cpu_stand_in="gloo",
            message_bytes=256 << 20,
            messages_per_pair=2,
            suggested_for=("collocated",),
        ),
        "cuda-ipc+nccl": Method(
            transport="refit.transport.two_sided.ipc_nccl:IpcNcclTransport",
            devices=("cuda",),
            needs="CUDA GPUs with access to each other on a host; cuda-ipc within hosts, nccl between them",
            cpu_stand_in="shm+gloo",
            message_bytes=256 << 20,
            messages_per_pair=2,
        ),
        "shm": Method(
            transport="refit.transport.one_sided.shm:SharedMemoryTransport",
            devices=("cpu",),
            needs="/dev/shm, all ranks on one host",
            links=(("cpu", WITHIN),),
            options="refit.transport.one_sided.options:ShmOptions",
            message_bytes=1 << 20,
            one_sided=True,
            single_host=True,
        ),
        "shm+gloo": Method(
            transport="refit.transport.two_sided.shm_gloo:SharedGlooTransport",
            devices=("cpu",),
            needs="/dev/shm; shm within hosts, gloo between them",
            message_bytes=4 << 20,
        ),
        "gloo": Method(
            transport="refit.transport.two_sided.gloo:GlooTransport",
            devices=("cpu", "cuda"),
            needs="nothing beyond torch",
            links=(("cpu", BETWEEN),),
            message_bytes=4 << 20,
            megatron_service="gloo",
        ),
        "nixl": Method(
            transport="refit.transport.one_sided.nixl.transport:NixlTransport",
            devices=("cpu", "cuda"),
            needs="nixl (Linux)",
            options="refit.transport.one_sided.nixl.options:NixlOptions",
            message_bytes=4 << 20,
            one_sided=True,
        ),
    },
)


def method_of_links(device: str, where: str) -> str:
    """The method that stands for links of a type of device, WITHIN hosts or BETWEEN them."""
    return next(name for name, row in METHODS.items() if (device, where) in row.links)


IDENTITY = "identity"
"""The encoding that is the default: the weights themselves are sent."""

ENCODINGS = Registry(
    "refit encoding",
    {
        IDENTITY: Encoding(title="the weights themselves"),
        "fp8": Encoding(
            title="codes and scales",
            wire="refit.encodings.fp8.wire:wire_to",
            bind="refit.encodings.fp8.live:LiveFp8",
            oracle="refit.encodings.fp8.oracle:oracle",
            dtypes=("fp8-block", "mxfp8"),
        ),
        "delta": Encoding(
            title="what has changed since the refit before",
            wire="refit.encodings.delta.wire:wire_of",
            bind="refit.encodings.delta.live:LiveDelta",
            oracle="refit.encodings.delta.oracle:oracle",
            has_options=True,
        ),
        "auto": Encoding(
            title="what has changed, or everything, whichever was faster before",
            wire="refit.encodings.delta.wire:wire_of",
            bind="refit.encodings.delta.live:LiveDelta",
            oracle="refit.encodings.delta.oracle:oracle",
            has_options=True,
            num_to_decide=5,
        ),
    },
)


def chosen_encodings() -> list[str]:
    """The encodings that a user may choose, whatever the destination holds."""
    return [name for name, row in ENCODINGS.items() if not row.dtypes]


def encodings_of(held_dtype: str | None, encoding: str) -> list[str]:
    """The rows of ENCODINGS that a refit goes through, in the order in which a source applies them.

    First what follows from `held_dtype`, the destination's own dtype, then `encoding`, the scenario's. Identity is no
    step. Raises UsageError for an unknown one.
    """
    following = [name for name, row in ENCODINGS.items() if held_dtype in row.dtypes]
    return [*following, *(name for name in (encoding,) if ENCODINGS[name].wire is not None)]


OWN_ENGINE = "refit"
"""The engine under test: this suite's plans and transports."""

BOTH = (OWN_ENGINE, "megatron")
"""The engines that `--refit-engine both` stands for."""

ENGINES = Registry(
    "refit engine",
    {
        "refit": Engine(engine="refit.bench.engines.refit:PlannedEngine", title="refit", encodes=True),
        "megatron": Engine(
            engine="refit.bench.engines.megatron:MegatronEngine",
            title="Megatron-Core",
            is_baseline=True,
            formats=("megatron",),
            single_chunk=True,
        ),
        "nccl-m2n": Engine(engine="refit.bench.engines.nccl_m2n:NcclM2nEngine", title="NCCL M2N", is_baseline=True),
        "vllm-reload": Engine(
            engine="refit.bench.engines.vllm_own:VllmReloadEngine",
            title="vLLM's reload",
            is_baseline=True,
            of_running=True,
        ),
        "vllm-ipc": Engine(
            engine="refit.bench.engines.vllm_own:VllmIpcEngine",
            title="vLLM's ipc update",
            is_baseline=True,
            of_running=True,
            of_cuda=True,
            encodes=True,
        ),
        "checkpoint-engine": Engine(
            engine="refit.bench.engines.checkpoint_engine:CheckpointEngine",
            title="checkpoint-engine",
            is_baseline=True,
            of_running=True,
            of_cuda=True,
            encodes=True,
        ),
        "full": Engine(
            engine="refit.bench.engines.refit:PlannedEngine",
            title="full refit",
            is_baseline=True,
            encodes=True,
            sends_everything=True,
        ),
    },
)

LOAD = "load"
"""The measurement that fills a source from a checkpoint: taken first wherever one is given."""

MEASUREMENTS = Registry(
    "measurement",
    {
        LOAD: MeasurementKind(
            measurement="refit.bench.measurements.load:LoadMeasurement",
            result="refit.results.checkpoints:LoadResult",
            closing_lines="refit.report.refits.checkpoint_lines:closing_lines",
            sides=("source",),
        ),
        "train-step": MeasurementKind(
            measurement="refit.bench.measurements.train_step:TrainStepMeasurement",
            result="refit.results.step:StepResult",
            closing_lines="refit.report.steps.step_lines:train_closing_lines",
            runs_steps=True,
            sides=("source",),
        ),
        "refit": MeasurementKind(
            measurement="refit.bench.measurements.refit:RefitMeasurement",
            result="refit.results.refit:RefitResult",
            closing_lines="refit.report.refits.refit_lines:closing_lines",
        ),
        "forward": MeasurementKind(
            measurement="refit.bench.measurements.forward:ForwardMeasurement",
            result="refit.results.step:ForwardResult",
            closing_lines="refit.report.steps.step_lines:forward_closing_lines",
            runs_steps=True,
            sides=("destination",),
        ),
    },
)

LAUNCHERS = Registry(
    "launcher",
    {
        "local": LauncherKind(launcher="refit.launch.local:LocalLauncher", title="this machine"),
        "slurm": LauncherKind(launcher="refit.launch.slurm:SlurmLauncher", title="the nodes of this Slurm allocation"),
        "kubernetes": LauncherKind(
            launcher="refit.launch.kubernetes.launcher:KubernetesLauncher", title="pods of a Kubernetes cluster"
        ),
    },
)

FAMILIES = Registry(
    "model family",
    {
        name: ModelFamily(family=f"refit.predict.families.{name}:{name.upper()}")
        for name in (
            "llama",
            "qwen2",
            "qwen3",
            "mixtral",
            "qwen3_moe",
            "glm4_moe",
            "minimax_m2",
            "gpt_oss",
            "qwen3_next",
            "deepseek_v3",
            "glm4_moe_lite",
            "deepseek_v2",
        )
    },
)
"""The last one that fits a model names its tensors."""
