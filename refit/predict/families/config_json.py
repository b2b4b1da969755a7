"""A family's config.json: read as Megatron-LM's flags, and written from a ModelShape.

What changes no weight is fixed (`NUMERICS`), the same for both libraries, so that their forward passes agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from refit.config import yaml_files
from refit.config.limits import MAX_LAYERS
from refit.config.shape import ModelShape
from refit.errors import UsageError
from refit.predict.families.config_keys import (
    BUILT_WITH,
    HARMLESS,
    LAYER_TYPES,
    NUMERICS,
    OTHER_WEIGHTS,
    REQUIRED,
    STYLE,
    TYPES_BESIDE_NETS,
    whole,
)
from refit.predict.families.names import check_names
from refit.predict.families.other_models import remedy
from refit.predict.families.tables import Family, families

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
        content |= {key.name: value for key in family.keys if (value := given.get(key.flag.replace("-", "_")))}
        flags = {**STYLE, **family.style, **_sizes(family, content), **_layers(family, content)}
        flags |= _switches(family, content)
        flags = {flag: value for flag, value in flags.items() if value is not False}
        for key, (value, reason) in _required(family).items():
            if content.get(key) not in (None, value):
                raise UsageError(f"{key} is {yaml_files.shortened(content[key])}, {value!r} is needed: {reason}")
        _check_derived(family, content)
        _check_all_read(family, content)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    if not content.get("tie_word_embeddings", False):
        flags["untie-embeddings-and-output-weights"] = True
    return ConfigJson(file, flags, tuple(f"{file}: {note}" for note in _notes(family, content)))


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
    for family in families():
        if given in (family.model_type, *family.aliases):
            return family
    known = ", ".join(name for family in families() for name in (family.model_type, *family.aliases))
    raise UsageError(
        f"model_type {yaml_files.shortened(given)} is of no known family, known are {known}: {remedy(content)}"
    )


def _sizes(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    sizes: dict[str, object] = {}
    for key in family.keys:
        value = next((content[name] for name in (key.name, *key.aliases) if content.get(name) is not None), None)
        if value is not None:
            sizes[key.flag] = whole(key.name, value)
        elif not key.optional:
            raise UsageError(f"{key.name} is missing, a {family.model_type} needs it")
    return sizes


def _switches(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    values = {switch: content.get(switch.name) or False for switch in family.switches}
    for switch, value in values.items():
        if not isinstance(value, bool):
            raise UsageError(f"{switch.name} must be true or false, got {yaml_files.shortened(value)}")
    return {switch.flag: True for switch, value in values.items() if value}


def _required(family: Family) -> dict[str, tuple[Any, str]]:
    """Keys with the one value that a model of `family` can be built with, and why."""
    other = {*family.unweighted, *(switch.name for switch in family.switches)}
    return {key: value for key, value in {**REQUIRED, **family.required}.items() if key not in other}


def _layers(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    """Flags of the shared experts, and of the layers that have routed ones."""
    if family.layer_flags is None:
        return {}
    num_layers = min(whole("num_hidden_layers", content["num_hidden_layers"]), MAX_LAYERS)  # more are refused later
    return family.layer_flags(content, num_layers)


def _check_derived(family: Family, content: Mapping[str, Any]) -> None:
    for key, others in family.derived.items():
        value, needed = content.get(key), sum(content[name] for name in others)
        if value not in (None, needed):
            raise UsageError(
                f"{key} is {yaml_files.shortened(value)}, a {family.model_type} needs {' + '.join(others)} = {needed}"
            )


def _check_all_read(family: Family, content: Mapping[str, Any]) -> None:
    """Raise UsageError for a key that nothing reads: it may ask for other weights. None asks for nothing."""
    types = content.get("layer_types") or []
    kinds = TYPES_BESIDE_NETS if family.linear else LAYER_TYPES
    other = next((kind for kind in types if kind not in kinds), None) if isinstance(types, list) else types
    if other is not None:
        raise UsageError(f"layer_types has {yaml_files.shortened(other)}, known are {', '.join(sorted(kinds))}")
    sizes = {name for key in family.keys for name in (key.name, *key.aliases)}
    sizes |= {switch.name for switch in family.switches}
    known = {
        *HARMLESS,
        *sizes,
        *family.layer_keys,
        *family.derived,
        *_required(family),
        *family.unweighted,
        *BUILT_WITH,
        *OTHER_WEIGHTS,
    }
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


def _notes(family: Family, content: Mapping[str, Any]) -> list[str]:
    others = [
        f"{key} {yaml_files.shortened(content[key], 40)}"
        for key, values in {**BUILT_WITH, **family.unweighted}.items()
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
    values = {key.name: attrgetter(key.attribute)(shape) for key in family.keys}
    values |= {
        **NUMERICS,
        **family.numerics,
        "model_type": family.model_type,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    values |= {switch.name: attrgetter(switch.attribute)(shape) for switch in family.switches}
    if shape.mla is not None:
        values["num_key_value_heads"] = shape.num_attention_heads  # as published ones have it, DeepSpeed reads it
    values |= family.layer_values(shape)
    if shape.experts is not None and family.expert_values is not None:
        values |= family.expert_values(shape.experts)
    return values
