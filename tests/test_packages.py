"""Which package may import which, read from the sources: arrows run down only, and no files import in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from refit.config.registry import ENCODINGS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "refit").rglob("*.py"))

ORDER = ("errors", "units", "config", "plan", "predict", "memory", "checkpoints", "copies", "encodings", "transport")
ORDER = (*ORDER, "models", "results", "report", "bench", "cli", "launch", "sweep", "commands")
"""The packages of `refit` from the bottom up: each imports only those before it."""

TORCH_FREE = ("config", "plan", "predict", "results", "report", "cli", "launch", "sweep", "commands")
"""Packages that load on a login node without torch. Functions may import matplotlib, and `cli` starts `bench`."""

HEAVY = (
    "torch",
    "megatron",
    "triton",
    "nvshmem",
    "refit.models",
    "refit.copies",
    "refit.transport",
    "refit.encodings",
    "refit.memory",
    "refit.bench",
)
MAY_IMPORT_MEGATRON = ("refit/models/megatron/", "refit/bench/engines/megatron.py")
LATER = {
    "refit/cli/main.py": {"refit.bench.runner.run"},
    "refit/commands/calibrate.py": {"refit.bench.calibration"},
    "refit/cli/forked.py": {f"refit.bench.launcher.{name}" for name in ("launch", "load_libraries", "uses_cuda")},
}
"""What a function of a torch-free package imports when it is called."""


def imports(path: Path, *, at_load: bool = False) -> Iterator[str]:
    """Every module that a file imports, `from a import b` as `a.b`; with `at_load` only what loading it imports."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which package they reach into"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_load and is_run_later(node)):
            pending.extend(ast.iter_child_nodes(node))


def is_run_later(node: ast.AST) -> bool:
    """Functions run when called, and what is for type checkers never runs."""
    typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def is_heavy(module: str) -> bool:
    return any(within(module, other) for other in HEAVY)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(module: str) -> str:
    """`plan` for `refit.plan.box.Box`."""
    return module.split(".")[1]


def file_of(module: str) -> Path | None:
    """The project's file behind `a.b.c`, which may be module c of package a.b or name c of module a.b."""
    for candidate in (module, module.rpartition(".")[0]):
        place = ROOT / candidate.replace(".", "/")
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if within(candidate, "refit") and file.exists():
                return file
    return None


def arrows(path: Path) -> set[str]:
    """The files of the project that a file imports, at any time."""
    found = (file_of(module) for module in imports(path))
    return {name_of(file) for file in found if file is not None}


def runs_up(importer: str, module: str) -> bool:
    return ORDER.index(package_of(module)) > ORDER.index(importer)


def a_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Files that import one another in a circle; empty where none do."""
    finished: set[str] = set()

    def visit(file: str, path: list[str]) -> list[str]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in finished:
            return []
        for other in sorted(graph.get(file, ())):
            if found := visit(other, [*path, file]):
                return found
        finished.add(file)
        return []

    return next((found for file in sorted(graph) if (found := visit(file, []))), [])


def test_the_page_on_the_architecture_lists_the_packages_in_this_order() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Packages")[2].partition("\n\nOnly ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == list(ORDER)


def test_the_page_on_the_architecture_names_the_packages_that_import_torch() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = page.partition("\nOnly ")[2].partition(" import torch")[0]
    loading = {path.relative_to(ROOT / "refit").parts[0] for path in SOURCES if loads_torch(path)}
    assert set(re.findall(r"`(\w+)`", named)) == loading


def loads_torch(path: Path) -> bool:
    return any(within(module, "torch") for module in imports(path, at_load=True))


def test_the_root_holds_packages_and_two_leaves() -> None:
    names = {path.relative_to(ROOT / "refit").parts[0] for path in SOURCES}
    leaves = {"__init__.py", "__main__.py", "errors.py", "units.py"}
    assert names == leaves | {name for name in ORDER if f"{name}.py" not in leaves}


@pytest.mark.parametrize("package", [name for name in ORDER if (ROOT / "refit" / name).is_dir()])
def test_arrows_run_down_only(package: str) -> None:
    files = sorted((ROOT / "refit" / package).rglob("*.py"))
    assert files
    up = [
        (name_of(path), module)
        for path in files
        for module in imports(path)
        if within(module, "refit") and module != "refit" and file_of(module) and "." in module
        if module not in ("refit.errors", "refit.units") and runs_up(package, module)
    ]
    assert up == []


def test_no_files_import_in_a_circle() -> None:
    graph = {name_of(path): arrows(path) - {name_of(path)} for path in SOURCES}
    assert a_circle(graph) == []


@pytest.mark.parametrize("package", TORCH_FREE)
def test_a_login_node_can_load_it(package: str) -> None:
    heavy = [
        (name_of(path), module)
        for path in sorted((ROOT / "refit" / package).rglob("*.py"))
        for module in set(imports(path)) - LATER.get(name_of(path), set())
        if is_heavy(module)
    ]
    assert heavy == []


def test_a_login_node_can_load_what_encodings_send() -> None:
    """The pure part of an encoding lies beside its live part, and is loaded by name. It may be more than one module."""
    files = {name: file_of(row.wire.replace(":", ".")) for name, row in ENCODINGS.items() if row.wire is not None}
    assert "fp8" in files
    assert None not in files.values()
    for name, file in files.items():
        left, seen = [file], set()
        while left:
            path = left.pop()
            if path is None or path in seen:
                continue
            seen.add(path)
            beside = {module: file_of(module) for module in imports(path) if within(module, "refit.encodings")}
            left += beside.values()
            assert [(name, module) for module in imports(path) if is_heavy(module) and module not in beside] == []


def test_only_megatrons_own_packages_import_it() -> None:
    outside = [path for path in SOURCES if not name_of(path).startswith(MAY_IMPORT_MEGATRON)]
    assert [(name_of(path), m) for path in outside for m in imports(path) if within(m, "megatron")] == []


def test_pictures_are_drawn_on_request_only() -> None:
    at_load = [(name_of(path), m) for path in SOURCES for m in imports(path, at_load=True) if within(m, "matplotlib")]
    assert at_load == []


def test_only_report_prints() -> None:
    outside = [path for path in SOURCES if not name_of(path).startswith("refit/report/")]
    assert [name_of(path) for path in outside if calls_print(path)] == []


def test_only_ranks_knows_the_default_group_in_transports() -> None:
    """All other code that moves weights is handed a `Ranks`, and so runs in processes with other groups too."""
    files = [
        path
        for name in ("memory", "copies", "transport", "encodings")
        for path in (ROOT / f"refit/{name}").rglob("*.py")
    ]
    assert [name_of(path) for path in files if asks_the_default_group(path)] == ["refit/transport/ranks.py"]


def asks_the_default_group(path: Path) -> bool:
    questions = {"get_rank", "get_world_size", "new_group", "WORLD", "_get_default_group", "_get_default_store"}
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return bool(questions & (names | {node.id for node in nodes if isinstance(node, ast.Name)}))


def calls_print(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)


def test_the_checks_can_fail(tmp_path: Path) -> None:
    offender = tmp_path / "offender.py"
    offender.write_text("from refit import transport\ndef f():\n    import torch.distributed\n    print(1)\n")
    assert set(imports(offender)) == {"refit.transport", "torch.distributed"}
    assert set(imports(offender, at_load=True)) == {"refit.transport"}
    assert runs_up("plan", "refit.transport.base.Transport")
    assert not runs_up("transport", "refit.plan.box.Box")
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert a_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert not within("torchvision", "torch")
    assert calls_print(offender)
    assert not asks_the_default_group(offender)
    offender.write_text("import torch.distributed as dist\ndist.get_rank()\n")
    assert asks_the_default_group(offender)
