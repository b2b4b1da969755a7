"""Model presets: YAML files that hold Megatron-LM's flags without the dashes, `num-layers: 61`."""

from __future__ import annotations

import argparse

from refit import yaml_configs
from refit.errors import UsageError
from refit.flags import model_parser


def load_preset(name: str) -> argparse.Namespace:
    """The model flags of a preset of `configs/models`, or of the YAML file at path `name`.

    Raises UsageError for an unknown preset, an unreadable file, a key that is no model flag or a value it cannot take.
    """
    path = yaml_configs.find("models", name)
    try:
        return model_parser().parse_mapping(yaml_configs.read_mapping(path))
    except UsageError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
