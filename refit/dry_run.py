"""A dry run: predict both sides, plan, add up. No GPU, no Megatron, no second process."""

from __future__ import annotations

import time
from dataclasses import dataclass

from refit import yaml_configs
from refit.config import Scenario
from refit.errors import UsageError
from refit.launch import check_num_ranks
from refit.model.catalog import predict
from refit.model.shape import ModelShape
from refit.plan.cost import Cluster, Cost, cost_of
from refit.plan.planner import plan_refit


@dataclass(frozen=True, slots=True)
class DryRunOptions:
    """What a dry run compares the need with. `num_gpus` None stands for as many as the scenario needs."""

    num_gpus: int | None = None
    gpus_per_node: int = 8
    cluster: Cluster | None = None


@dataclass(frozen=True, slots=True)
class DryRun:
    """A scenario's figures. `source_bytes` and `destination_bytes` are the weights of each rank of that side."""

    scenario: Scenario
    model: ModelShape
    options: DryRunOptions
    num_gpus: int
    num_parameters: int
    num_tensors: int
    source_bytes: dict[int, int]
    destination_bytes: dict[int, int]
    cost: Cost
    predict_s: float
    plan_s: float


def dry_run(scenario: Scenario, options: DryRunOptions) -> DryRun:
    """Plan `scenario` on predicted inventories. Raises UsageError where there are too few GPUs."""
    if scenario.model is None:
        raise UsageError("--dry-run predicts the models that flags describe: a --model-provider has to be run")
    num_gpus = options.num_gpus or scenario.num_ranks
    check_num_ranks(scenario, num_gpus)
    start_s = time.perf_counter()
    source = predict(scenario.model, scenario.source, transformer_impl=scenario.transformer_impl)
    destination = predict(scenario.model, scenario.destination, transformer_impl=scenario.transformer_impl)
    predicted_s = time.perf_counter()
    plan = plan_refit(source, destination, ranks_per_node=options.gpus_per_node)
    planned_s = time.perf_counter()
    return DryRun(
        scenario=scenario,
        model=scenario.model,
        options=options,
        num_gpus=num_gpus,
        num_parameters=source.num_parameters,
        num_tensors=len(source.tensors),
        source_bytes=dict(source.bytes_per_rank),
        destination_bytes=dict(destination.bytes_per_rank),
        cost=cost_of(plan),
        predict_s=predicted_s - start_s,
        plan_s=planned_s - predicted_s,
    )


def load_cluster(name: str) -> Cluster:
    """A file of `configs/clusters`, or the YAML file at path `name`.

    Keys: `link_gb_per_s` (GB/s of one GPU in one direction), `gpu_memory_gb` (may be left out), `source`.
    Raises UsageError for an unknown name or key, or a value that is no positive number.
    """
    path = yaml_configs.find("clusters", name)
    values = yaml_configs.read_mapping(path)
    unknown = sorted(values.keys() - {"link_gb_per_s", "gpu_memory_gb", "source"})
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]}: link_gb_per_s, gpu_memory_gb and source are known")
    for key in ("link_gb_per_s", "gpu_memory_gb"):
        value = values.get(key)
        given = value is not None or key == "link_gb_per_s"
        if given and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise UsageError(f"{path}: {key} must be a positive number, not {value!r}")
    memory_gb, link_gb_per_s = values.get("gpu_memory_gb"), values["link_gb_per_s"]
    assert isinstance(link_gb_per_s, int | float)
    memory_bytes = int(memory_gb * 1e9) if isinstance(memory_gb, int | float) else None
    return Cluster(path.stem, link_gb_per_s * 1e9, memory_bytes, str(values.get("source", "")))
