"""The tables of formats, methods, engines and measurements: their rules, and that their rows lead to code."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from refit.bench.engines.base import RefitEngine
from refit.bench.measurements.base import Measurement
from refit.config.registry import ENGINES, FORMATS, MEASUREMENTS, METHODS, Registry, load
from refit.errors import UsageError
from refit.transport.base import Transport

TABLES: list[tuple[Registry[Any], str, str]] = [
    (FORMATS, "side format", "autotp, fsdp2, megatron, vllm"),
    (METHODS, "refit method", "cuda-ipc, cuda-ipc+nccl, gloo, nccl, nixl, nvshmem, shm, shm+gloo"),
    (ENGINES, "refit engine", "checkpoint-engine, full, megatron, nccl-m2n, refit, vllm-ipc, vllm-reload"),
    (MEASUREMENTS, "measurement", "forward, load, refit, train-step"),
]
REFERENCES = {
    f"{name}.{type(row).__name__}.{field.name}": getattr(row, field.name)
    for table, *_ in TABLES
    for name, entry in table.items()
    for row in (entry, getattr(entry, "steps", None))
    if row is not None
    for field in fields(row)
    if isinstance(getattr(row, field.name), str) and ":" in getattr(row, field.name)
}


def promised(protocol: type) -> set[str]:
    """The public methods of a protocol."""
    return {name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")}


@pytest.mark.parametrize(("table", "kind", "names"), TABLES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_unknown_name_lists_the_known_ones(table: Registry[Any], kind: str, names: str) -> None:
    assert sorted(table) == names.split(", ")
    assert "nosuch" not in table
    with pytest.raises(UsageError) as caught:
        table["nosuch"]
    assert str(caught.value) == f"unknown {kind} 'nosuch': choose one of {names}"


def test_names_keep_their_order() -> None:
    table = Registry("number", {"two": 2, "one": 1})
    table.add("three", 3)
    assert list(table) == ["two", "one", "three"]
    assert list(table.items()) == [("two", 2), ("one", 1), ("three", 3)]
    with pytest.raises(ValueError, match="number 'one' is registered already"):
        table.add("one", 4)
    assert table["one"] == 1


def test_a_row_added_for_a_while_is_gone_afterwards() -> None:
    rows = {"one": 1}
    table = Registry("number", rows)
    with table.added("two", 2):
        assert (table["two"], list(table)) == (2, ["one", "two"])
        with pytest.raises(ValueError, match="registered already"), table.added("one", 3):
            pass
    assert list(table) == ["one"]
    with pytest.raises(RuntimeError), table.added("two", 2):
        raise RuntimeError
    assert list(table) == ["one"]
    assert rows == {"one": 1}


@pytest.mark.slow
def test_references_load_without_the_libraries_of_gpus() -> None:
    """They are imported when a transport or a kernel is used."""
    code = (
        "import sys\n"
        "for name in ('nvshmem', 'cuda', 'pynvml', 'triton', 'transformer_engine'):\n"
        "    sys.modules[name] = None\n"
        "from refit.config.registry import load\n"
        f"for reference in {list(REFERENCES.values())!r}:\n"
        "    assert load(reference) is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", tuple(FORMATS))
def test_formats(name: str) -> None:
    row = FORMATS[name]
    parameters = {
        reference: list(inspect.signature(load(reference)).parameters)
        for reference in (row.predict, row.check, row.build)
    }
    assert [len(found) for found in parameters.values()] == [2, 3, 4]


@pytest.mark.parametrize("name", tuple(METHODS))
def test_methods(name: str) -> None:
    row = METHODS[name]
    transport = load(row.transport)()
    assert transport.name == name
    for method in promised(Transport):
        assert callable(getattr(transport, method))
    assert set(row.devices) <= {"cpu", "cuda"}
    assert row.device == row.devices[0]
    if row.cpu_stand_in is not None:
        stand_in = METHODS[row.cpu_stand_in]
        assert (stand_in.device, stand_in.one_sided) == ("cpu", row.one_sided)
    else:
        assert "cpu" in row.devices


@pytest.mark.parametrize("name", tuple(ENGINES))
def test_engines(name: str) -> None:
    row = ENGINES[name]
    engine = load(row.engine)
    for method in promised(RefitEngine):
        assert callable(getattr(engine, method))
    assert isinstance(engine.uses_plan, bool)
    assert list(inspect.signature(engine).parameters) == ["scenario", "device"]
    assert row.title
    assert set(row.formats or ()) <= set(FORMATS)


@pytest.mark.parametrize("name", tuple(MEASUREMENTS))
def test_measurements(name: str) -> None:
    row = MEASUREMENTS[name]
    measurement = load(row.measurement)()
    for method in promised(Measurement):
        assert callable(getattr(measurement, method))
    assert is_dataclass(load(row.result)) or hasattr(load(row.result), "__struct_fields__")
    assert callable(load(row.closing_lines))
