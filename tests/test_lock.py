"""The lock and pyproject.toml agree: what `make` installs stands in the lock, once per Python, within its range."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
QUICKSTART = " ".join((ROOT / "docs/quickstart.md").read_text(encoding="utf-8").split())
MEASURED = " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in ROOT.glob("docs/measurements/*.md"))
LOCK = (ROOT / "requirements/lock.txt").read_text(encoding="utf-8")
ENTRIES = re.split(r"\n(?=\S)", LOCK[re.search(r"^\w", LOCK, re.MULTILINE).start() :].rstrip())  # type: ignore[union-attr]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def wanted(extra: str | None, python: dict[str, str]) -> Iterator[Requirement]:
    """The project's requirements with `extra`, those of extras that it names included, for one Python."""
    for text in PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for named in requirement.extras:
                yield from wanted(named, python)
        elif requirement.marker is None or requirement.marker.evaluate(python):
            yield requirement


def locked(python: dict[str, str]) -> dict[str, list[str]]:
    """The versions that the lock has for one Python, by name."""
    found: dict[str, list[str]] = {}
    for entry in ENTRIES:
        requirement = Requirement(entry.partition("\\")[0])
        if requirement.marker is None or requirement.marker.evaluate(python):
            (pin,) = requirement.specifier
            assert pin.operator == "==", entry
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


@pytest.mark.parametrize("version", PYTHONS)
def test_every_dependency_stands_in_the_lock(version: str) -> None:
    python = {"python_version": version, "python_full_version": f"{version}.5", "sys_platform": "linux"}
    pins = locked(python)
    assert [name for name, versions in pins.items() if len(versions) > 1] == []
    requirements = [*wanted(None, python), *wanted("dev", python)]
    assert len(requirements) > 20
    outside = {
        f"{requirement} and the lock's {pins.get(requirement.name.lower())}: make lock"
        for requirement in requirements
        if requirement.name != "torch"
        and not any(requirement.specifier.contains(pin) for pin in pins.get(canonicalize_name(requirement.name), ()))
    }
    assert outside == set()


@pytest.mark.parametrize("extra", [None, "nvshmem", "m2n", "te"])
def test_floors_that_need_gpus_have_been_measured(extra: str | None) -> None:
    (requirement,) = (each for each in wanted(extra, {}) if extra or each.name == "torch")
    (floor,) = requirement.specifier
    assert re.search(rf"\b{requirement.name} {re.escape(floor.version)}\b", MEASURED), f"no run with {requirement}"


def test_the_makefile_installs_a_torch_within_the_range() -> None:
    (chosen,) = re.findall(r"^TORCH \?= torch==(\S+)$", MAKEFILE, re.MULTILINE)
    (torch,) = (each for each in wanted(None, {}) if each.name == "torch")
    assert torch.specifier.contains(chosen)


def test_the_image_has_what_the_makefile_installs() -> None:
    """Base, torch and NVSHMEM are pinned in the Dockerfile; the lock has the rest."""
    pins = dict(re.findall(r"^ARG (\w+)=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    assert re.search(rf"^TORCH \?= {re.escape(pins['TORCH'])}$", MAKEFILE, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:13\.[0-9.]+-base-ubuntu24\.04", pins["BASE"])
    assert f"--no-deps {pins['NVSHMEM']} " in QUICKSTART
    (floor,) = wanted("nvshmem", {})
    assert Requirement(pins["NVSHMEM4PY"]).name == floor.name


def test_each_file_has_its_hash_and_no_index_is_named() -> None:
    assert [entry for entry in ENTRIES if "--hash=sha256:" not in entry] == []
    assert re.findall(r"https?:|--(?:extra-)?index-url|--find-links| @ ", LOCK) == []
    assert not re.search(r"^(?:torch|nvidia-\S*)==", LOCK, re.MULTILINE), "TORCH chooses them"


def test_python_has_its_megatron_core() -> None:
    """What CI tests beside each other: the newest that Python 3.11 and Python 3.12 can install."""
    of_python = {version: locked({"python_full_version": f"{version}.5"})["megatron-core"] for version in PYTHONS}
    assert of_python["3.10"] == of_python["3.11"] != of_python["3.12"] == of_python["3.13"]
    (older,), (newer,) = of_python["3.11"], of_python["3.12"]
    assert f"Megatron-Core is {older} on Python 3.10 and 3.11, {newer} from 3.12 on." in QUICKSTART
