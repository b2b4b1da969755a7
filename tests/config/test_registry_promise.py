"""Nothing but its row lists the name of a format, method, encoding, engine, launcher or family, read from the sources.

A module may say its own name, and a word may have another meaning in a place: those are below, with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from refit.config.registry import ENCODINGS, ENGINES, FAMILIES, FORMATS, LAUNCHERS, METHODS

ROOT = Path(__file__).resolve().parents[2]
NAMES = {*FORMATS, *METHODS, *ENCODINGS, *ENGINES, *LAUNCHERS, *FAMILIES}
ORDINARY = {"auto", "delta", "fp8", "full", "local", "megatron", "refit"}
"""Names that are words of other things too: `auto` of several choices, `fp8` of dtypes, `megatron` of the package,
`refit` of the command and the measurement. `test_the_defaults_have_names_in_the_registry` looks for `megatron` in lists
and comparisons."""

ELSEWHERE = {
    "refit/bench/calibration.py": ({"gloo"}, "a backend of torch.distributed"),
    "refit/bench/engines/checkpoint_engine.py": ({"nccl"}, "a backend of torch.distributed"),
    "refit/bench/engines/megatron.py": ({"gloo", "nvshmem"}, "Megatron-Core's services"),
    "refit/bench/engines/nccl_m2n.py": ({"nccl"}, "what that library moves bytes with"),
    "refit/bench/engines/own_update.py": ({"fsdp2"}, "a whole model of transformers is such a side on one rank"),
    "refit/bench/environment.py": ({"nccl"}, "the version of a library"),
    "refit/bench/profile.py": ({"nvshmem"}, "part of a kernel's name"),
    "refit/bench/session.py": ({"gloo"}, "a backend of torch.distributed"),
    "refit/commands/": ({"slurm"}, "the launcher inside an allocation, which Slurm's variables show"),
    "refit/config/rows.py": ({"nccl"}, "Megatron-Core's services"),
    "refit/launch/": ({*LAUNCHERS, "shm"}, "what launchers call themselves, and volumes of memory"),
    "refit/models/huggingface/whole.py": ({"fsdp2"}, "a whole model of transformers is such a side on one rank"),
    "refit/models/process_groups.py": ({"nccl"}, "a backend of torch.distributed"),
    "refit/results/upgrade.py": ({*FORMATS, *METHODS, *ENGINES}, "what files of older versions have in them"),
    "refit/transport/one_sided/ipc_memory.py": ({"cuda-ipc", "nccl"}, "its own name, and the remedy of its messages"),
    "refit/transport/one_sided/nixl/library.py": ({"nixl"}, "the library's logger"),
    "refit/transport/one_sided/nvshmem_library.py": ({"nvshmem"}, "the library's package"),
    "refit/transport/one_sided/shm.py": ({"shm", "gloo"}, "its own name, and the remedy of its messages"),
    "refit/transport/two_sided/ipc_nccl.py": ({"cuda-ipc", "nccl"}, "the names of its two parts"),
    "refit/transport/two_sided/shm_gloo.py": ({"shm", "gloo", "shm+gloo"}, "the names of its two parts"),
}


def own_names() -> Iterator[tuple[str, str]]:
    """The modules that rows name, each with the name of its row."""
    for name, method in METHODS.items():
        yield method.transport, name
    for name, family in FAMILIES.items():
        yield family.family, name


OWN = {(f"{reference.partition(':')[0].replace('.', '/')}.py", name) for reference, name in own_names()}


def said(source: str) -> set[str]:
    """The names that a module has as strings of their own; text with more words in it is no list of names."""
    tree = ast.parse(source)
    joined = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    words = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in joined
    }
    return words & (NAMES - ORDINARY)


def elsewhere() -> dict[str, set[str]]:
    """By file of refit outside the registry: the names that it says and that are not its own."""
    found = {}
    for path in sorted((ROOT / "refit").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        names = {name for name in said(path.read_text(encoding="utf-8")) if (file, name) not in OWN}
        if names and file != "refit/config/registry.py":
            found[file] = names
    return found


def allowed(file: str) -> set[str]:
    """The names that may stand in a file, by its own entry or its folder's."""
    return {name for place, (names, _) in ELSEWHERE.items() if file.startswith(place) for name in names}


def test_nothing_else_lists_the_names() -> None:
    found = elsewhere()
    listed = {file: names - allowed(file) for file, names in found.items()}
    assert {file: names for file, names in listed.items() if names} == {}, "ask the row, or give it a field"
    unused = [place for place in ELSEWHERE if not place.endswith("/") and place not in found]
    assert unused == [], "these say none any more"


def test_the_defaults_have_names_in_the_registry() -> None:
    """`megatron` as a format, and the engines of `both`: what compares or builds with them asks the registry."""
    lists = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "refit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Compare)
        for part in ast.iter_child_nodes(node)
        if isinstance(part, ast.Constant) and part.value == "megatron"
    }
    lists -= {file for file in lists if file.startswith("refit/sweep/search")}  # formats that a search begins with
    assert lists - {"refit/results/upgrade.py"} == {"refit/config/registry.py"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('if method == "nvshmem":\n    pass', {"nvshmem"}),
        ('KNOWN = ("gloo", "fsdp2", "mixtral")', {"gloo", "fsdp2", "mixtral"}),
        ('raise ValueError("use gloo instead")', set()),
        ('raise ValueError(f"use {name}, not gloo")', set()),
        ('mode = "auto"', set()),
    ],
)
def test_the_check_can_fail(source: str, expected: set[str]) -> None:
    assert said(source) == expected
