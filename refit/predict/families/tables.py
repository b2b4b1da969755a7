"""What families of models are made of: tensors as Hugging Face names them, and the logical tensors that they are.

Logical tensors are those of `refit.predict.megatron`. Names are those of transformers 5 (`state_dict()` of the causal
language model) and, for single experts, of the published checkpoints. A format that joins tensors (vLLM's `qkv_proj`)
joins rows of these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from refit.config.registry import FAMILIES, load
from refit.config.shape import Experts, LayerKind, ModelShape
from refit.predict.families.config_keys import Key, Switch
from refit.predict.megatron import Split

Release = tuple[int, int]
"""The first two numbers of a version of transformers."""


class Part(Enum):
    """The rows of a logical tensor that a Hugging Face tensor has, in order."""

    WHOLE = "all of them"
    QUERY = "of every query group [queries; key; value], the queries"
    KEY = "of every query group, the key"
    VALUE = "of every query group, the value"
    GATE = "of [gate; up], the first half"
    UP = "of [gate; up], the second half"
    QUERY_AND_GATE = "of every query group [queries; gates; key; value], each head's query and then its gate"
    IN_TURN = "of several logical tensors, the rows of the first key head, then those of the second, and so on"
    SECTIONS = "of several logical tensors, all rows of the first, then all of the second, and so on"


@dataclass(frozen=True, slots=True)
class Row:
    """A Hugging Face tensor and the rows of the logical tensor `key` that it has. Both names are below the layer's.

    `split` is how tensor parallelism splits it. A `routed` tensor is `[num_experts, ...]`, or with `{expert}` in its
    name one expert's. `optional` ones exist only where the logical tensor does. A `buffer` is no parameter.
    A `transposed` one has the logical tensor's columns before its rows, an `interleaved` one its gate and up rows in
    turn. From release `float32_since` on, transformers keeps a parameter in float32 in models of 16 bits; vLLM does
    where it is `float32_in_vllm`. One that is IN_TURN or in SECTIONS has the rows of the logical tensors `others`
    too. `in_transformers` is how transformers' own plan splits a delta net over tensor parallelism, of which every rank
    computes all; None: as `split` says.
    """

    name: str
    key: str
    split: Split = Split.REPLICATED
    part: Part = Part.WHOLE
    routed: bool = False
    optional: bool = False
    buffer: bool = False
    float32_since: Release | None = None
    float32_in_vllm: bool = False
    transposed: bool = False
    interleaved: bool = False
    others: tuple[str, ...] = ()
    in_transformers: Split | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The logical tensors that it has rows of, in their order."""
        return (self.key, *self.others)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """The tables of one family. `model_type` is that of config.json; `aliases` are others with the same tensors.

    A layer has the tensors of `layer`, or of `linear` where it has a delta net, and those of `dense` or `routed` by its
    MLP. `single_experts` are the routed
    experts where each has tensors of its own, as in published checkpoints. It `fits` shapes with this kind of attention
    and MLP.

    Of config.json it has `keys` for sizes, `style`, the flags of every model of it, `layer_keys`, which say which
    layers have routed experts and how wide the shared ones are, with `layer_flags(content, num_layers)`, the flags that
    they become, and `layer_values(shape)` and `expert_values(experts)`, the other way round; `derived`: keys that must
    be the sum of others, as it has no weights of other sizes; `switches`, which leave out optional tensors; `required`,
    keys with another needed value than `config_keys.REQUIRED` has; and `numerics`, other values than
    `config_keys.NUMERICS` of what changes no weight, with `unweighted`: values of keys that it is built with, not those
    of `config_keys.BUILT_WITH`.
    `class_name` is what its class is called where that is not `model_type` in camel case.
    `engine_values(shape)` are keys that vLLM's model reads beside them, `engine_names` beginnings of names that only
    vLLM has, and `engine_experts` its experts where they lie otherwise. With `eager_attention` transformers has no
    other. `published` are beginnings of names below a
    layer's that published checkpoints and vLLM have in place of transformers'. `misfit` says what to
    change where it cannot have these sizes.
    """

    model_type: str
    fits: Callable[[ModelShape], bool]
    model: tuple[Row, ...]
    layer: tuple[Row, ...]
    dense: tuple[Row, ...]
    keys: tuple[Key, ...]
    style: Mapping[str, object]
    linear: tuple[Row, ...] = ()
    routed: tuple[Row, ...] = ()
    experts: tuple[Row, ...] = ()
    single_experts: tuple[Row, ...] = ()
    aliases: tuple[str, ...] = ()
    layer_keys: tuple[str, ...] = ()
    layer_flags: Callable[[Mapping[str, Any], int], dict[str, object]] | None = None
    layer_values: Callable[[ModelShape], dict[str, Any]] = lambda _: {}
    expert_values: Callable[[Experts], dict[str, Any]] | None = None
    derived: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    switches: tuple[Switch, ...] = ()
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    unweighted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    class_name: str | None = None
    engine_names: Mapping[str, str] = field(default_factory=dict)
    engine_experts: tuple[Row, ...] = ()
    eager_attention: bool = False
    engine_values: Callable[[ModelShape], dict[str, Any]] = lambda _: {}
    published: Mapping[str, str] = field(default_factory=dict)
    misfit: Callable[[ModelShape], str | None] = lambda _: None

    def has(self, key: str) -> bool:
        """Whether some layer has a tensor that is a part of the logical tensor `key`, or of one below it."""
        rows = (*self.layer, *self.linear, *self.dense, *self.routed)
        return any(row.key == key or row.key.startswith(f"{key}.") for row in rows)

    @property
    def architecture(self) -> str:
        """The class of the model, as `architectures` of config.json has it."""
        words = self.model_type.split("_")
        return f"{self.class_name or ''.join(word.capitalize() for word in words)}ForCausalLM"

    @property
    def norms_over_heads(self) -> bool:
        """Whether its norms of queries and keys run over all heads: their weights are split with the heads."""
        return any(row.key == QUERY_NORM and row.split is Split.COLUMN for row in self.layer)

    def rows_of(self, kind: LayerKind) -> tuple[Row, ...]:
        """Those of a layer of this kind, but for its routed experts."""
        return (*(self.linear if kind.delta_net else self.layer), *(self.routed if kind.routed else self.dense))

    def published_name(self, name: str) -> str:
        """What published checkpoints call the tensor `name` of a layer."""
        begin = next((begin for begin in self.published if name.startswith(begin)), "")
        return self.published.get(begin, "") + name.removeprefix(begin)

    def engine_name(self, name: str) -> str:
        """What vLLM calls the tensor `name` of a layer, or one outside the layers."""
        begin = next((begin for begin in self.engine_names if name.startswith(begin)), None)
        return self.published_name(name) if begin is None else self.engine_names[begin] + name.removeprefix(begin)

    def needs(self, key: str) -> bool:
        """Whether every layer with attention has the logical tensor `key`."""
        return any(row.key == key and not row.optional for row in self.layer)


# The logical tensors that several rows name.
QKV, QKV_BIAS = "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"
FC1, FC2 = "linear_fc1.weight", "linear_fc2.weight"
PROJECTION_BIAS = "self_attention.linear_proj.bias"
SINKS = "self_attention.core_attention.softmax_offset"
EXPERTS, SHARED, EXPERT_BIAS_KEY = "mlp.experts.experts", "mlp.shared_experts", "mlp.router.expert_bias"
SHARED_GATE = f"{SHARED}.gate_weight"
QUERY_NORM, KEY_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

MODEL = (
    Row("model.embed_tokens.weight", EMBEDDING, Split.COLUMN),
    Row("model.norm.weight", "decoder.final_layernorm.weight"),
    Row("lm_head.weight", OUTPUT, Split.COLUMN, optional=True),  # absent where embeddings are tied
)
NORMS = (
    Row("input_layernorm.weight", "input_layernorm.weight"),
    Row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
)
GROUPED_QUERY_ATTENTION = (
    Row("self_attn.q_proj.weight", QKV, Split.COLUMN, Part.QUERY),
    Row("self_attn.k_proj.weight", QKV, Split.COLUMN, Part.KEY),
    Row("self_attn.v_proj.weight", QKV, Split.COLUMN, Part.VALUE),
    Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", Split.ROW),
)
QUERY_KEY_NORMS = (
    Row("self_attn.q_norm.weight", QUERY_NORM),
    Row("self_attn.k_norm.weight", KEY_NORM),
)
QUERY_KEY_VALUE_BIASES = (
    Row("self_attn.q_proj.bias", QKV_BIAS, Split.COLUMN, Part.QUERY),
    Row("self_attn.k_proj.bias", QKV_BIAS, Split.COLUMN, Part.KEY),
    Row("self_attn.v_proj.bias", QKV_BIAS, Split.COLUMN, Part.VALUE),
)
LATENT_ATTENTION = (
    # Queries are projected in one step, or down and up with a norm between.
    Row("self_attn.q_proj.weight", "self_attention.linear_q_proj.weight", Split.COLUMN, optional=True),
    Row("self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight", optional=True),
    Row("self_attn.q_a_layernorm.weight", QUERY_NORM, optional=True),
    Row("self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight", Split.COLUMN, optional=True),
    Row("self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight"),
    Row("self_attn.kv_a_layernorm.weight", "self_attention.kv_layernorm.weight"),
    Row("self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight", Split.COLUMN),
    Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", Split.ROW),
)
DENSE_MLP = (
    Row("mlp.gate_proj.weight", f"mlp.{FC1}", Split.COLUMN, Part.GATE),
    Row("mlp.up_proj.weight", f"mlp.{FC1}", Split.COLUMN, Part.UP),
    Row("mlp.down_proj.weight", f"mlp.{FC2}", Split.ROW),
)
ROUTER = (Row("mlp.gate.weight", "mlp.router.weight"),)
FLOAT32_ROUTER = (Row("mlp.gate.weight", "mlp.router.weight", float32_since=(5, 24)),)
EXPERT_BIAS = (Row("mlp.gate.e_score_correction_bias", EXPERT_BIAS_KEY, buffer=True),)
SHARED_EXPERTS = (
    Row("mlp.shared_experts.gate_proj.weight", f"{SHARED}.{FC1}", Split.COLUMN, Part.GATE),
    Row("mlp.shared_experts.up_proj.weight", f"{SHARED}.{FC1}", Split.COLUMN, Part.UP),
    Row("mlp.shared_experts.down_proj.weight", f"{SHARED}.{FC2}", Split.ROW),
)
FUSED_EXPERTS = (
    Row("mlp.experts.gate_up_proj", f"{EXPERTS}.{FC1}", Split.GATED, routed=True),
    Row("mlp.experts.down_proj", f"{EXPERTS}.{FC2}", Split.ROW, routed=True),
)
SINGLE_EXPERTS = (
    Row("mlp.experts.{expert}.gate_proj.weight", f"{EXPERTS}.{FC1}", Split.COLUMN, Part.GATE, routed=True),
    Row("mlp.experts.{expert}.up_proj.weight", f"{EXPERTS}.{FC1}", Split.COLUMN, Part.UP, routed=True),
    Row("mlp.experts.{expert}.down_proj.weight", f"{EXPERTS}.{FC2}", Split.ROW, routed=True),
)


def families() -> list[Family]:
    """Every family that is registered."""
    return [load(row.family) for _, row in FAMILIES.items()]


def closest_family(shape: ModelShape) -> Family:
    """The last family for models like this one. Whether it has all tensors of `shape` is not checked here."""
    return next(family for family in reversed(families()) if family.fits(shape))
