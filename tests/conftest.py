from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ranks.pool import RankPool

# By default Hypothesis fails an example that takes longer than 200 ms, as one may beside eight busy ranks.
settings.register_profile("no deadline", settings(), deadline=None)
settings.load_profile("no deadline")

POOL = RankPool(8)


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Eight rank processes over Gloo, shared by all tests that need ranks."""
    return POOL


def needs_ranks(item: pytest.Item | None) -> bool:
    return "ranks" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that need ranks together, and on one worker of pytest-xdist: each worker has a pool of its own.

    Tests that start ranks over shared memory by themselves join them with `@pytest.mark.xdist_group("ranks")`, since
    some tests look at all that is in /dev/shm.
    """
    items.sort(key=needs_ranks)
    for item in items:
        if needs_ranks(item):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the ranks where the next test does not need them: idle ones still poll."""
    if needs_ranks(item) and not needs_ranks(nextitem):
        POOL.stop()
