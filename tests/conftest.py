from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Eight rank processes over Gloo, shared by all tests that need ranks."""
    pool = RankPool(8)
    yield pool
    pool.stop()
