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


def size_flag(side: str, size: str) -> str:
    """`--expert-model-parallel-size` for ("source", "ep")."""
    return f"--{SIZE_FLAGS[size][side == 'destination']}"
