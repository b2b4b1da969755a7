"""Model presets: YAML files that hold Megatron-LM's flags without the dashes, `num-layers: 61`, and config.json."""

from __future__ import annotations

import argparse
import itertools

from refit.cli.flags import model_parser
from refit.cli.model_flags import GROUP_FLAGS, LATENT_FLAGS
from refit.config import yaml_files
from refit.errors import UsageError
from refit.predict.families.config_json import ConfigJson


def load_preset(name: str) -> argparse.Namespace:
    """The model flags of a preset of `configs/models`, or of the YAML file at path `name`.

    Raises UsageError for an unknown preset, an unreadable file, a key that is no model flag or a value it cannot take.
    """
    path = yaml_files.find("models", name)
    try:
        return model_parser().parse_mapping(yaml_files.read_mapping(path))
    except UsageError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def config_flags(config: ConfigJson) -> argparse.Namespace:
    """The model flags of a config.json. Raises UsageError for a value that its flag cannot take."""
    try:
        return model_parser().parse_mapping(config.flags)
    except UsageError as error:
        raise UsageError(f"{config.path}: {error}") from None


def give_way(preset: argparse.Namespace, given: argparse.Namespace) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """`preset` without what contradicts the flags `given` beside it, and notes on what was changed.

    A list of layers in `--moe-layer-freq` follows a given number of layers: its last entry stands for further layers.
    """
    kept, notes = argparse.Namespace(**vars(preset)), tuple[str, ...]()
    for flags, others in _CONTRADICTING:
        if any(getattr(given, name) for name in flags):
            vars(kept).update({name: None if getattr(kept, name) else getattr(kept, name) for name in others})
    layers: int | None = given.num_layers
    listed = kept.moe_layer_freq
    if layers is not None and isinstance(listed, tuple) and listed and given.moe_layer_freq is None:
        kept.moe_layer_freq = (*listed[:layers], *listed[-1:] * (layers - len(listed)))
        if layers != len(listed):
            dense = kept.moe_layer_freq.count(False)
            notes = (
                f"{dense} of {layers} layers are dense: the preset's list of {len(listed)} layers, fitted to them",
            )
    return kept, notes


_SIZES_OF_VOCABULARY = (("padded_vocab_size",), ("vocab_size", "make_vocab_size_divisible_by"))
_KINDS_OF_ATTENTION = (("multi_latent_attention", *LATENT_FLAGS), GROUP_FLAGS)
_CONTRADICTING = (
    *itertools.permutations(_SIZES_OF_VOCABULARY),
    *itertools.permutations(_KINDS_OF_ATTENTION),
)
"""Flags, and those that they take the place of."""
