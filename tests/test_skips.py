"""What CI makes of skipped tests, seen with a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.skips import EXPECTED

ROOT = Path(__file__).resolve().parent.parent
HEAD = "import pytest\n\n"
MODULE = HEAD + 'pytest.importorskip("no_such_module")\n'


def skipped(*reasons: str) -> str:
    """A module with a test skipped for each reason."""
    tests = (f"@pytest.mark.skipif(True, reason={why!r})\ndef test_{i}(): pass\n\n" for i, why in enumerate(reasons))
    return HEAD + "".join(tests)


def run(tmp_path: Path, text: str, **environ: str) -> tuple[int, str]:
    """Exit code and output."""
    (tmp_path / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", "-c", os.devnull]
    kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=ROOT,
        env=kept | environ,
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout


def test_a_reason_that_is_not_listed_fails_in_ci(tmp_path: Path) -> None:
    code, output = run(tmp_path, skipped("no Slurm here", *EXPECTED), CI="true")
    assert code == 1
    assert "skipped in CI: no Slurm here" in output
    assert f"{len(EXPECTED)} skipped, 1 error" in output


def test_a_whole_module_fails_in_ci(tmp_path: Path) -> None:
    code, output = run(tmp_path, MODULE, CI="true")
    assert (code, "skipped in CI: could not import 'no_such_module'" in output) == (2, True)


def test_elsewhere_any_reason_will_do(tmp_path: Path) -> None:
    code, output = run(tmp_path, skipped("no Slurm here"))
    assert (code, "1 skipped" in output) == (0, True)
