"""Names of the flags for the sizes of each side. Flags, messages and remedies all use this table."""

from __future__ import annotations

SIZE_FLAGS = {
    "tp": ("tensor-model-parallel-size", "rl-inference-tensor-model-parallel-size"),
    "pp": ("pipeline-model-parallel-size", "rl-inference-pipeline-model-parallel-size"),
    "ep": ("expert-model-parallel-size", "rl-inference-expert-model-parallel-size"),
    "etp": ("expert-tensor-parallel-size", "rl-inference-expert-tensor-model-parallel-size"),
    "vpp": ("num-virtual-stages-per-pipeline-rank", "rl-inference-num-virtual-stages-per-pipeline-rank"),
    "first_stage_layers": ("decoder-first-pipeline-num-layers", "rl-inference-decoder-first-pipeline-num-layers"),
    "last_stage_layers": ("decoder-last-pipeline-num-layers", "rl-inference-decoder-last-pipeline-num-layers"),
    "world_size": ("source-world-size", "destination-world-size"),
}
"""Field of `Layout` -> the source's flag and the destination's, without dashes.

Names are Megatron-LM's where it has one.
"""

LAYERS_PER_CHUNK_FLAGS = (
    "num-layers-per-virtual-pipeline-stage",
    "rl-inference-num-layers-per-virtual-pipeline-stage",
)
"""The same as `vpp`, by the layers of a model chunk."""

PIPELINE_LAYOUT_FLAGS = ("pipeline-model-parallel-layout", "rl-inference-pipeline-model-parallel-layout")
"""The same as `vpp` and the layers of a stage, chunk by chunk."""

FORMAT_FLAGS = ("source-format", "rl-inference-format")
"""The source's flag and the destination's, without dashes."""

OPTION_FLAGS: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "fsdp2": {"replicate_size": ("fsdp-replicate-size", "rl-inference-fsdp-replicate-size")},
    "autotp": {"zero_stage": ("zero-stage", None)},
    "vllm": {
        "data_parallel_size": (None, "rl-inference-data-parallel-size"),
        "replicas": (None, "rl-inference-replicas"),
        "num_redundant_experts": (None, "rl-inference-num-redundant-experts"),
        "placement": (None, "rl-inference-expert-placement"),
        "placement_next": (None, "rl-inference-expert-placement-next"),
        "engine_python": (None, "rl-inference-engine-python"),
        "engine_sleep": (None, "rl-inference-engine-sleep"),
    },
}
"""Format -> field of its options (`SideSpec.options`) -> the source's flag and the destination's, without dashes.

None where a side has no such setting: a format that only destinations have has no flags of the source.
"""


def size_flag(side: str, size: str) -> str:
    """`--expert-model-parallel-size` for ("source", "ep")."""
    return f"--{SIZE_FLAGS[size][side == 'destination']}"
