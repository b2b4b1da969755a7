"""FP8 destinations: block formats, the rules by which libraries choose scales, and which tensors stay BF16.

Torch-free. `refit.encodings.fp8.reference` has the arithmetic of each rule, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from refit.errors import UsageError

CODES_DTYPE = "float8_e4m3fn"
"""The dtype of codes in every format: 448 is the largest, 2**-9 the smallest above zero (OCP FP8, arXiv:2209.05433)."""

SCALE_SUFFIX = "_scale_inv"
"""Behind a weight's key in the key of its scales, as in DeepSeek-V3's checkpoints. Codes x scales are the weights."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How the scale of a block follows from its largest absolute value. `source` says who uses it, and the formula."""

    source: str


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One scale of `scale_dtype` per block of `rows` x `columns` of the last two dims. The first rule is the default.

    `whole`: columns must be a multiple of the block's. Otherwise the last block of a dim may be smaller.
    """

    rows: int
    columns: int
    scale_dtype: str
    whole: bool
    rules: dict[str, Rule]

    @property
    def text(self) -> str:
        return f"{self.rows}x{self.columns}"


BLOCK_FORMATS = {
    "fp8-block": BlockFormat(
        rows=128,
        columns=128,
        scale_dtype="float32",
        whole=False,
        rules={
            "amax": Rule("slime, miles: max(amax, 1e-10) / 448, codes are x times its reciprocal"),
            "amax-inverse": Rule("NeMo-RL: codes are x * (448 / amax), whose reciprocal is stored"),
            "pow2": Rule("Transformer Engine, DeepGEMM: the power of two from amax / 448 upwards"),
        },
    ),
    "mxfp8": BlockFormat(
        rows=1,
        columns=32,
        scale_dtype="float8_e8m0fnu",
        whole=True,
        rules={
            "ceil": Rule("Megatron-Core, Transformer Engine, flashinfer: 2 ** ceil(log2(amax / 448))"),
            "ocp-floor": Rule("OCP Microscaling Formats 1.0: 2 ** (floor(log2(amax)) - 8), larger values become 448"),
        },
    ),
}
"""Values of `--rl-inference-dtype` that quantise."""

DELTA_NETS = ("conv1d", "beta.in_proj", "alpha.in_proj", "gate_weight")
"""Of models with delta nets: what vLLM cannot have in FP8, and the gate of shared experts."""

KEPT = ("embedding", "output_layer", "norm", "router", "eh_proj", *DELTA_NETS)
"""Parts of the keys of tensors that stay BF16, as in the published checkpoints of DeepSeek-V3 and Kimi K2. Tensors of
one dim (norms, biases) always stay."""


class Place(str, Enum):
    """Where weights are quantised. AUTO: at the source where a block lies whole in what a source rank holds."""

    AUTO = "auto"
    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a destination holds its weights.

    Raises UsageError for a rule of another dtype.
    """

    dtype: str
    """A name of `BLOCK_FORMATS`."""
    rule: str
    """One of its rules."""
    kept: tuple[str, ...] = KEPT
    """Tensors with one of these in their keys stay as they are."""
    place: Place = Place.AUTO
    """Where weights are quantised."""

    def __post_init__(self) -> None:
        rules = self.format.rules
        if self.rule not in rules:
            owner = next((name for name, other in BLOCK_FORMATS.items() if self.rule in other.rules), None)
            of = f"is a rule of {owner}" if owner else "is no rule"
            raise UsageError(f"--fp8-scale-rule {self.rule} {of}: {self.dtype} has {', '.join(rules)}")

    @property
    def format(self) -> BlockFormat:
        return BLOCK_FORMATS[self.dtype]

    @property
    def source(self) -> str:
        """Who uses the rule, and its formula."""
        return self.format.rules[self.rule].source

    def quantises(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor `key` becomes codes and scales."""
        return len(shape) > 1 and key.endswith("weight") and not any(part in key for part in self.kept)


def scale_key(key: str) -> str:
    """The key of the scales of tensor `key`."""
    return key + SCALE_SUFFIX
