"""A wheel works from any folder: presets, scenarios and clusters are inside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import refit

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_brings_its_configs(tmp_path: Path) -> None:
    wheels, site, elsewhere = (tmp_path / name for name in ("wheels", "site", "elsewhere"))
    elsewhere.mkdir()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for arguments in (["sweep", "plan", "--scenarios", "kimi_k2", "--cluster", "h100_ib400"], ["--version"]):
        ran = subprocess.run(
            [sys.executable, "-m", "refit", *arguments],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
    assert refit.__version__ in ran.stdout
    assert {path.name for path in (site / "refit/configs/models").iterdir()} == {
        path.name for path in (ROOT / "configs/models").iterdir()
    }
