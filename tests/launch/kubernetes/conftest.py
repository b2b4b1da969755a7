"""The site that sweeps against a small API server have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.kubernetes.site import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Site]]:
    made: list[Site] = []

    def make(behave: Any) -> Site:
        made.append(Site(tmp_path, monkeypatch, behave))
        return made[-1]

    yield make
    for each in made:
        each.cluster.close()
