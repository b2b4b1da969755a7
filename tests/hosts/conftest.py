from __future__ import annotations

import pytest

from tests.hosts.network import unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there can be no hosts, and keep them on one worker of pytest-xdist."""
    reason = unavailable()
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.xdist_group("hosts"))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
