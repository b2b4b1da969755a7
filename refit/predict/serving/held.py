"""What the ranks of a stage hold of each part of a model: the bytes that a pass reads, and the elements that it
multiplies with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from refit.config.quantisation import CODES_DTYPE
from refit.predict.serving.layout import Stage

ATTENTION, DENSE, SHARED, ROUTED, OUTPUT = "attention", "dense MLPs", "shared experts", "routed experts", "output layer"
"""Parts of a model. Norms of layers are with the attention, routers with the shared experts. The embedding is read by
row, and counts only where it is the output layer too."""


@dataclass(frozen=True, slots=True)
class Part:
    """Of one part on a rank: bytes, and elements of matrices in FP8 and in other dtypes. Of ROUTED, of one expert in
    one layer."""

    nbytes: float = 0.0
    fp8: float = 0.0
    other: float = 0.0


def parts_of(stage: Stage, num_routed: int, tied: bool) -> Mapping[str, Part]:
    """The parts of a stage with `num_routed` layers of experts, by name.

    Layers of multi-token prediction decode nothing, and are left out.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for each in stage.held:
        part = part_of(each.tensor.key, tied)
        if part is None:
            continue
        share = 1 / num_routed if part == ROUTED else 1
        summed = sums[part]
        summed[0] += share * each.nbytes
        if len(each.tensor.shape) > 1:
            summed[1 if each.tensor.dtype == CODES_DTYPE else 2] += share * each.elements
    return {name: Part(*summed) for name, summed in sums.items()}


def part_of(key: str, tied: bool) -> str | None:
    """The part of the tensor with this canonical key; None for what a decode step does not read."""
    if key.startswith("embedding.word_embeddings"):
        return OUTPUT if tied else None
    if key.startswith(("embedding.", "mtp.")):
        return None
    if not key.startswith("decoder.layers."):
        return OUTPUT
    name = key.split(".", 3)[3]
    if name.startswith(("self_attention", "input_layernorm", "pre_mlp_layernorm")):
        return ATTENTION
    if name.startswith("mlp.experts."):
        return ROUTED
    return (
        SHARED if name.startswith(("mlp.router", "mlp.shared_experts", "mlp.fc1_latent", "mlp.fc2_latent")) else DENSE
    )
