"""Sums of a profile by stream and kind."""

from __future__ import annotations

import pytest

from refit.bench.profile import Interval, activities, kind_of


def test_launches_are_added_up_by_stream_and_kind() -> None:
    found = activities(
        [
            Interval(7, "copy kernel", 2_000_000, 3_000_000),
            Interval(7, "copy kernel", 1_000_000, 2_500_000),  # two of them at once count once
            Interval(7, "copy kernel", 5_000_000, 6_000_000),
            Interval(9, "NCCL kernel", 4_000_000, 9_000_000),
        ]
    )
    assert [(each.stream, each.kind, each.num_launches) for each in found] == [
        (7, "copy kernel", 3),
        (9, "NCCL kernel", 1),
    ]
    assert [each.busy_s for each in found] == pytest.approx([3e-3, 5e-3])
    assert [(each.first_s, each.last_s) for each in found] == [pytest.approx((0, 5e-3)), pytest.approx((3e-3, 8e-3))]


def test_no_launch_is_no_activity() -> None:
    assert activities([]) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "NCCL kernel"),
        ("_copy_tiles", "copy kernel"),
        ("Memcpy DtoD (Device -> Device)", "memcpy"),
        ("something_else", "something_else"),
    ],
)
def test_kernels_are_called_by_what_they_are(name: str, kind: str) -> None:
    assert kind_of(name) == kind
