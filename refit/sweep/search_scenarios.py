"""Writes layouts that a search found as a list of scenarios for a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from refit.cli.parsing import read_flags
from refit.config.registry import METHODS
from refit.predict.findings import Found


def scenario_file(found: Sequence[Found], model: str | None) -> str:
    """YAML as `configs/scenarios` holds it, in the order of `found`. Every scenario has all its flags."""
    title = f"Layouts for {model}" if model else "Layouts"
    content = {"title": title, "scenarios": [_scenario(one) for one in found]}
    text: str = yaml.safe_dump(content, sort_keys=False, width=120)
    return text


def _scenario(found: Found) -> dict[str, object]:
    values: dict[str, list[object]] = {}
    for word in found.flags:
        name, given, value = word.partition("=")
        if word.startswith("--"):
            values[name] = [_number(value)] if given else []
        else:
            values[list(values)[-1]].append(_number(word))
    args = read_flags(found.flags)
    if args.refit_method is None:
        values["--refit-method"] = [next(name for name, row in METHODS.items() if args.refit_mode in row.suggested_for)]
    name = re.sub(r"[^A-Za-z0-9]+", "_", f"{found.source} to {found.destination}")
    return {"name": name, **{flag[2:]: _one(held) for flag, held in values.items()}}


def _one(values: list[object]) -> object:
    return values if len(values) > 1 else values[0] if values else True


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,17}", text) else text
