from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.ranks.megatron import may_build, pytest_runtest_call  # noqa: F401 - a hook
from tests.ranks.pool import RankPool
from tests.skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 - hooks

# By default Hypothesis fails an example that takes longer than 200 ms, or longer to draw, as one may on a busy machine.
settings.register_profile("no clock", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

POOL = RankPool(8)


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Eight rank processes over Gloo, shared by all tests that need ranks."""
    return POOL


def needs_ranks(item: pytest.Item | None) -> bool:
    return "ranks" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that need ranks together, and on one worker of pytest-xdist: each worker has a pool of its own."""
    items.sort(key=needs_ranks)
    for item in items:
        if may_build(item):
            item.add_marker(pytest.mark.megatron)
        if needs_ranks(item):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the ranks where the next test does not need them: idle ones still poll."""
    if needs_ranks(item) and not needs_ranks(nextitem):
        POOL.stop()
