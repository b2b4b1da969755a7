"""The YAML files under `configs/`: finding them by name and reading them."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

from refit.errors import UsageError

_PACKAGED = Path(__file__).resolve().parents[1] / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).resolve().parents[2] / "configs"
"""In an installed wheel inside the package, in a checkout at its top."""


def names(kind: str) -> list[str]:
    """Names of the files in `configs/<kind>`, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """The file for `name`: `name` itself where it is a path to a YAML file, otherwise `configs/<kind>/<name>.yaml`.

    Raises UsageError, listing the known names, for an unknown name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = names(kind)
    if name in known:
        return CONFIG_DIR / kind / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise UsageError(
        f"unknown {kind.removesuffix('s')} {name!r}: {hint} {', '.join(known)}, or give a path to a .yaml file"
    )


def read_mapping(path: Path) -> dict[str, object]:
    """The YAML mapping in `path`. Raises UsageError where it cannot be read or is something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UsageError(f"{path} is not valid YAML{where}: {problem}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold `key: value` lines, not {_kind(content)}")
    return {str(key): value for key, value in content.items()}


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"
