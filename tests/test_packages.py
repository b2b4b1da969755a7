"""Which room may import which, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "refit").rglob("*.py"))

FORBIDDEN = {
    "refit/plan": ("torch", "megatron", "refit.transport", "refit.bench", "refit.models.megatron", "refit.report"),
    "refit/predict": ("torch", "megatron", "refit.transport", "refit.bench", "refit.models.megatron", "refit.report"),
    "refit/transport": ("megatron", "refit.bench", "refit.models.megatron", "refit.report"),
    "refit/models": ("refit.bench", "refit.report"),
    "refit/report": (
        "torch",
        "megatron",
        "refit.bench",
        "refit.transport",
        "refit.models.megatron",
        "refit.sweep",
        "refit.commands",
    ),
    "refit/bench/measurements": ("megatron", "refit.cli", "refit.sweep", "refit.commands"),
    "refit/sweep": ("torch", "megatron", "refit.transport", "refit.bench", "refit.models.megatron", "refit.commands"),
    "refit/commands": ("torch", "megatron", "matplotlib", "refit.transport", "refit.bench", "refit.models.megatron"),
}

DRY_RUN_ENTRY = ROOT / "refit/cli/parsing.py"
COMMAND_ENTRY = ROOT / "refit/commands/__init__.py"


def imports(path: Path, *, at_load: bool = False) -> Iterator[str]:
    """Every module that a file imports, `from a import b` as `a.b`; with `at_load` only those that loading it
    imports."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room they reach into"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_load and is_run_later(node)):
            pending.extend(ast.iter_child_nodes(node))


def is_run_later(node: ast.AST) -> bool:
    """Functions run when called, and what is for type checkers never runs."""
    typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = [path for path in SOURCES if name_of(path).startswith(room + "/")]
    assert files
    found = [(name_of(path), module) for path in files for module in imports(path) if is_forbidden(module, room)]
    assert found == []


def is_forbidden(module: str, room: str) -> bool:
    return any(within(module, other) for other in FORBIDDEN[room])


def test_only_its_own_room_imports_megatron() -> None:
    outside = [
        path for path in SOURCES if not name_of(path).startswith(("refit/models/megatron/", "refit/bench/engines/"))
    ]
    found = [(name_of(path), module) for path in outside for module in imports(path) if within(module, "megatron")]
    assert found == []


def test_only_report_prints() -> None:
    outside = [path for path in SOURCES if not name_of(path).startswith("refit/report/")]
    assert [name_of(path) for path in outside if calls_print(path)] == []


def calls_print(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)


def loaded_with(entry: Path) -> dict[str, set[str]]:
    """File -> modules it imports, for `entry` and every file of the project that loading it loads."""
    loaded: dict[str, set[str]] = {}
    pending = [entry]
    while pending:
        path = pending.pop()
        if name_of(path) in loaded:
            continue
        loaded[name_of(path)] = set(imports(path, at_load=True))
        for module in loaded[name_of(path)]:
            # `a.b.c` may be module c of package a.b or name c of module a.b.
            for candidate in (module, module.rpartition(".")[0]):
                place = ROOT / candidate.replace(".", "/")
                if within(candidate, "refit"):
                    pending += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()]
    return loaded


def test_a_dry_run_loads_neither_torch_nor_megatron() -> None:
    loaded = loaded_with(DRY_RUN_ENTRY)
    assert {"refit/predict/dry_run.py", "refit/predict/megatron.py", "refit/plan/planner.py"} <= loaded.keys()
    heavy = ("torch", "megatron", "refit.bench", "refit.transport", "refit.models.megatron")
    assert [
        (file, m) for file, modules in loaded.items() for m in modules if any(within(m, room) for room in heavy)
    ] == []


def test_the_console_command_loads_on_a_login_node() -> None:
    loaded = loaded_with(COMMAND_ENTRY)
    assert {"refit/commands/sweep.py", "refit/sweep/check.py", "refit/report/summary.py"} <= loaded.keys()
    heavy = ("torch", "megatron", "matplotlib", "refit.bench", "refit.transport", "refit.models.megatron")
    assert [
        (file, m) for file, modules in loaded.items() for m in modules if any(within(m, room) for room in heavy)
    ] == []


def test_the_checks_can_fail(tmp_path: Path) -> None:
    offender = tmp_path / "offender.py"
    offender.write_text("from refit import transport\ndef f():\n    import torch.distributed\n    print(1)\n")
    assert set(imports(offender)) == {"refit.transport", "torch.distributed"}
    assert set(imports(offender, at_load=True)) == {"refit.transport"}
    assert is_forbidden("refit.transport", "refit/plan")
    assert is_forbidden("torch.distributed", "refit/plan")
    assert not is_forbidden("torchvision", "refit/plan")
    assert calls_print(offender)
