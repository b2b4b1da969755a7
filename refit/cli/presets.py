"""Model presets: YAML files that hold Megatron-LM's flags without the dashes, `num-layers: 61`, and config.json."""

from __future__ import annotations

import argparse

from refit.cli.flags import model_parser
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
