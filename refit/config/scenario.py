"""Scenario: everything one run needs to know, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from refit.config.layout import Layout, short_text
from refit.config.shape import ModelShape
from refit.plan.cost import Cluster


class Mode(str, Enum):
    """Whether both models live on the same ranks or on disjoint windows."""

    COLLOCATED = "collocated"
    NON_COLLOCATED = "non-collocated"


class Method(str, Enum):
    """What moves the bytes."""

    NVSHMEM = "nvshmem"
    NCCL = "nccl"
    GLOO = "gloo"
    SHM = "shm"


class Engine(str, Enum):
    """Whose refit runs: ours, Megatron-Core's `swap_model_weights`, or one after the other."""

    REFIT = "refit"
    MEGATRON = "megatron"
    BOTH = "both"


class Verify(str, Enum):
    """How many destination elements are compared after each refit."""

    FULL = "full"
    SAMPLE = "sample"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One refit benchmark: two layouts of one model, how to move it, how often, and what to check.

    `model` is None where `model_provider` builds a model of its own.
    `recorded` holds accepted flags that do not change weights (`--seq-length`, ...), for the result file.
    `run_name` names the result file; None: time and scenario do.
    `cluster` gives the speeds that the refit's time is held against, None where none was named.
    `device` is "cpu" or "cuda" where the user has said it; None goes by the method.
    `notes` are lines the user should read once: choices made on their behalf.
    """

    model: ModelShape | None
    source: Layout
    destination: Layout
    mode: Mode
    method: Method
    engine: Engine = Engine.REFIT
    num_warmup: int = 2
    num_iterations: int = 5
    verify: Verify = Verify.FULL
    check_forward: bool = False
    profile: bool = False
    staging_bytes: int = 512 << 20
    timeout_s: float = 300.0
    transformer_impl: str = "local"
    model_name: str | None = None
    model_provider: str | None = None
    output_dir: Path = Path("benchmark_results")
    recorded: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()
    device: str | None = None
    nvshmem_buffers: str = "ring"
    nvshmem_force_put: bool = False
    cluster: Cluster | None = None
    run_name: str | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that take part: both windows, once where they are shared."""
        return max(self.source.ranks.stop, self.destination.ranks.stop)

    @property
    def title(self) -> str:
        """`TP2 EP2 -> TP2 EP1`; PP and ETP where they are not 1 and TP."""
        return f"{short_text(self.source)} -> {short_text(self.destination)}"
