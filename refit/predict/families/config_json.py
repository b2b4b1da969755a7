"""A family's config.json: read as Megatron-LM's flags, and written from a ModelShape.

What changes no weight is fixed (`NUMERICS`), the same for both libraries, so that their forward passes agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from refit.config import yaml_files
from refit.config.limits import MAX_LAYERS
from refit.config.shape import Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families.config_keys import (
    BUILT_WITH,
    DERIVED,
    HARMLESS,
    KEYS,
    LAYER_TYPES,
    LAYERS,
    NUMERICS,
    OTHER_WEIGHTS,
    REQUIRED,
    STYLE,
    STYLES,
)
from refit.predict.families.names import check_names
from refit.predict.families.other_models import remedy
from refit.predict.families.tables import DEEPSEEK_V3, FAMILIES, QWEN3, QWEN3_MOE, Family

FILE_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class ConfigJson:
    """A config.json as flags (a preset's mapping), and notes on what in it is not honoured."""

    path: Path
    flags: dict[str, object]
    notes: tuple[str, ...]


# --- From config.json to flags -----------------------------------------------------------------------------------


def read_config_json(path: Path, given: Mapping[str, object]) -> ConfigJson:
    """Read `path`, a config.json or the folder of one. `given` are flags by attribute, None where they are not given:
    they take the place of the file's sizes, so that what is derived from these follows.

    Raises UsageError where it cannot be read, lacks a key, names another architecture or asks for weights that no
    family has. Values are checked as the flags that they become.
    """
    file = path / FILE_NAME if path.is_dir() else path
    content = _content(file)
    try:
        family = _family(content)
        content |= {key.name: value for key in KEYS[family] if (value := given.get(key.flag.replace("-", "_")))}
        flags = {**STYLE, **STYLES[family], **_sizes(family, content), **_layers(family, content)}
        for key, (value, reason) in REQUIRED.items():
            if content.get(key) not in (None, value):
                raise UsageError(f"{key} is {yaml_files.shortened(content[key])}, {value!r} is needed: {reason}")
        _check_derived(family, content)
        _check_all_read(family, content)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    if not content.get("tie_word_embeddings", False):
        flags["untie-embeddings-and-output-weights"] = True
    return ConfigJson(file, flags, tuple(f"{file}: {note}" for note in _notes(content)))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(yaml_files.read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _family(content: Mapping[str, Any]) -> Family:
    given = content.get("model_type")
    for family in FAMILIES:
        if given in (family.model_type, *family.aliases):
            return family
    known = ", ".join(name for family in FAMILIES for name in (family.model_type, *family.aliases))
    raise UsageError(
        f"model_type {yaml_files.shortened(given)} is of no known family, known are {known}: {remedy(content)}"
    )


def _sizes(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    sizes: dict[str, object] = {}
    for key in KEYS[family]:
        value = next((content[name] for name in (key.name, *key.aliases) if content.get(name) is not None), None)
        if value is not None:
            sizes[key.flag] = _whole(key.name, value)
        elif not key.optional:
            raise UsageError(f"{key.name} is missing, a {family.model_type} needs it")
    return sizes


def _layers(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    """Flags of the shared experts, and of the layers that have routed ones."""
    if family is QWEN3:
        return {}
    num_layers = min(_whole("num_hidden_layers", content["num_hidden_layers"]), MAX_LAYERS)  # more are refused later
    if family is DEEPSEEK_V3:
        shared = _whole("n_shared_experts", content.get("n_shared_experts", 1))
        width = shared * _whole("moe_intermediate_size", content["moe_intermediate_size"])
        num_dense = _whole("first_k_dense_replace", content.get("first_k_dense_replace", 0), least=0)
        step = _whole("moe_layer_freq", content.get("moe_layer_freq", 1))
        # As vLLM and DeepSeek's own code have it. transformers has no such key.
        routed = [int(layer >= num_dense and layer % step == 0) for layer in range(num_layers)]
        if not any(routed):
            raise UsageError(
                f"first_k_dense_replace {num_dense} and moe_layer_freq {step} of {num_layers} layers leave none with "
                "experts"
            )
        return {"moe-shared-expert-intermediate-size": width, "moe-layer-freq": f"{routed}"}
    step = _whole("decoder_sparse_step", content.get("decoder_sparse_step", 1))
    dense = content.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise UsageError(f"mlp_only_layers must be a list of layers, got {yaml_files.shortened(dense)}")
    routed = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(num_layers)]
    return {"moe-layer-freq": f"{routed}"}


def _check_derived(family: Family, content: Mapping[str, Any]) -> None:
    for key, others in DERIVED.get(family, {}).items():
        value, needed = content.get(key), sum(content[name] for name in others)
        if value not in (None, needed):
            raise UsageError(
                f"{key} is {yaml_files.shortened(value)}, a {family.model_type} needs {' + '.join(others)} = {needed}"
            )


def _check_all_read(family: Family, content: Mapping[str, Any]) -> None:
    """Raise UsageError for a key that nothing reads: it may ask for other weights. None asks for nothing."""
    types = content.get("layer_types") or []
    other = next((kind for kind in types if kind not in LAYER_TYPES), None) if isinstance(types, list) else types
    if other is not None:
        raise UsageError(f"layer_types has {yaml_files.shortened(other)}, known are {', '.join(sorted(LAYER_TYPES))}")
    sizes = {name for key in KEYS[family] for name in (key.name, *key.aliases)}
    known = {*HARMLESS, *sizes, *LAYERS[family], *DERIVED.get(family, {}), *REQUIRED, *BUILT_WITH, *OTHER_WEIGHTS}
    unread = [
        f"{yaml_files.shortened(key, 40)} {yaml_files.shortened(value, 40)}"
        for key, value in content.items()
        if key not in known and value is not None
    ]
    if unread:
        raise UsageError(
            f"no {family.model_type} is known to have {', '.join(unread[:5])}"
            f"{f' and {len(unread) - 5} more keys' if len(unread) > 5 else ''}: leave them out of the file if they "
            "change no weight"
        )


def _whole(name: str, value: object, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise UsageError(f"{name} must be a whole number from {least}, got {yaml_files.shortened(value)}")
    return value


def _notes(content: Mapping[str, Any]) -> list[str]:
    others = [
        f"{key} {yaml_files.shortened(content[key], 40)}"
        for key, values in BUILT_WITH.items()
        if key in content and content[key] not in values
    ]
    notes = [
        f"{key} is not honoured: {done}"
        for key, (neutral, done) in OTHER_WEIGHTS.items()
        if content.get(key) not in neutral
    ]
    if others:
        notes.append(f"not honoured, as no weight depends on it: {', '.join(others)}")
    return notes


# --- From a ModelShape to the values of config.json ---------------------------------------------------------------


def config_values(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json that describe `shape`, with `model_type`.

    Raises UsageError where the family's configuration cannot describe it.
    """
    family = check_names(shape)
    values = {key.name: attrgetter(key.attribute)(shape) for key in KEYS[family]}
    values |= {**NUMERICS, "model_type": family.model_type, "tie_word_embeddings": shape.tied_embeddings}
    if shape.mla is not None:
        values["num_key_value_heads"] = shape.num_attention_heads  # as published ones have it, DeepSpeed reads it
    if shape.experts is not None:
        values |= _EXPERT_VALUES[family](shape.experts)
    return values


def _qwen3_moe_values(experts: Experts) -> dict[str, Any]:
    dense = [layer for layer, routed in enumerate(experts.layers) if not routed]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1, "norm_topk_prob": experts.topk > 1}


def _deepseek_v3_values(experts: Experts) -> dict[str, Any]:
    num_dense = experts.layers.index(True) if True in experts.layers else len(experts.layers)
    if not all(experts.layers[num_dense:]):
        raise UsageError(
            f"deepseek_v3 of transformers has its dense layers first, here layer {num_dense} has experts and layer "
            f"{num_dense + experts.layers[num_dense:].index(False)} has none: change --moe-layer-freq"
        )
    shared, rest = divmod(experts.shared_ffn_hidden_size or 0, experts.ffn_hidden_size)
    if rest:
        raise UsageError(
            f"deepseek_v3 of transformers has shared experts as wide as routed ones: "
            f"--moe-shared-expert-intermediate-size {experts.shared_ffn_hidden_size} is no multiple of "
            f"{experts.ffn_hidden_size}"
        )
    return {
        "first_k_dense_replace": num_dense,
        "n_shared_experts": shared,
        "norm_topk_prob": experts.topk > 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


_EXPERT_VALUES: dict[Family, Callable[[Experts], dict[str, Any]]] = {
    QWEN3_MOE: _qwen3_moe_values,
    DEEPSEEK_V3: _deepseek_v3_values,
}
