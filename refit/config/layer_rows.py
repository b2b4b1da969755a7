"""JSON files with a row for each layer: placements and loads of experts, as engines dump them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refit.config import yaml_files
from refit.errors import UsageError


def read_layer_rows(file: Path, key: str) -> list[Any]:
    """The rows in `file`, not yet checked: a list that is not empty, alone or under `key`. Raises UsageError."""
    try:
        content = json.loads(yaml_files.read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{file} holds no {key}: give a JSON object with that key, or a list with one row per layer")
    return rows
