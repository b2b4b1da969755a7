"""Plugins: rows from outside the checkout, for one version of the interface, registered once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refit.commands import main
from refit.config import plugins
from refit.config.plugins import INTERFACE, load_plugins, named, without
from refit.config.registry import METHODS
from refit.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = "from refit.config.registry import METHODS\ndef register():\n    METHODS.add(NAME, METHODS['gloo'])\n"


def test_what_a_command_line_names() -> None:
    words = ["run", "--plugin", "a.b", "--model", "tiny", "--plugin=c", "--plugin", "a.b"]
    assert named(words) == ["a.b", "c"]
    assert without(words) == ["run", "--model", "tiny"]
    assert named(["--plugin"]) == []
    assert named(["--plugins", "a"]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nowhere_to_be_found", "cannot be imported: No module named 'nowhere_to_be_found'"),
        ("1 / 0", "cannot be imported: division by zero"),
        ("x = 1", f"is no plugin: it needs REFIT_INTERFACE = {INTERFACE} and a function register"),
        (f"REFIT_INTERFACE = {INTERFACE}", "is no plugin: "),
        (f"REFIT_INTERFACE = {INTERFACE + 1}\ndef register(): ...", "was written for interface 2, this suite has 1: "),
        (f"REFIT_INTERFACE = {INTERFACE}\nNAME = 'gloo'\n{REGISTERS}", "refit method 'gloo' is registered already"),
    ],
)
def test_what_is_no_plugin_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    content: str,
    message: str,
) -> None:
    name = f"no_plugin_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    for words in (
        ["run", "--plugin", name],
        ["report", ".", f"--plugin={name}"],
        ["sweep", "plan", "--", "--plugin", name],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith((f"error: --plugin {name}", f"error: --plugin '{name}'"))
        assert message in error
        assert len(error.splitlines()) == 1


def test_a_plugin_is_registered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registers_pigeon.py").write_text(f"REFIT_INTERFACE = {INTERFACE}\nNAME = 'pigeon'\n{REGISTERS}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(plugins, "_registered", set())
    try:
        load_plugins(["--plugin", "registers_pigeon"])
        load_plugins(["--plugin=registers_pigeon"])
        assert "pigeon" in METHODS
    finally:
        del METHODS._rows["pigeon"]
    with pytest.raises(UsageError, match="unknown refit method 'pigeon'"):
        METHODS["pigeon"]


def ran(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "refit", *words, "--plugin", "examples.plugin"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_example_moves_weights(tmp_path: Path, start: str) -> None:
    flags = ["--model", "tiny", "--num-layers", "1", "--moe-layer-freq", "1", "--refit-method", "queue"]
    sizes = ["--vocab-size", "512", "--rl-inference-tensor-model-parallel-size", "2"]
    code, output = ran(tmp_path, "run", "--start", start, *flags, *sizes, "--output-dir", str(tmp_path))
    assert code == 0, output
    assert "Rows of the plugin examples.plugin are registered." in output
    assert "PASSED" in output


@pytest.mark.slow
def test_the_example_starts_ranks(tmp_path: Path) -> None:
    line = "1:1:2:1:non-collocated:queue:small"
    (tmp_path / "list.yaml").write_text(
        "defaults: {model: tiny, num-layers: 1, moe-layer-freq: 1, vocab-size: 512, plugin: examples.plugin}\n"
        f"scenarios: ['{line}']\n"
    )
    chosen = ["--scenarios", str(tmp_path / "list.yaml"), "--cpu-fallback", "--output-dir", str(tmp_path)]
    code, output = ran(tmp_path, "sweep", "run", *chosen, "--launcher", "nice")
    assert code == 0, output
    assert "1 ok" in output
    code, output = ran(tmp_path, "report", str(tmp_path))
    assert code == 0, output
    assert "queue" in output
