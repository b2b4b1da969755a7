"""Statuses: their exit codes, their order, the engine that decides."""

from __future__ import annotations

import pytest

from refit.errors import ExitCode
from refit.results.refit import EngineResult, RefitResult
from refit.results.refit import tested_engine as judged_engine
from refit.results.status import COUNTED, Status, worst


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([], Status.OK),
        ([Status.OK, Status.OK], Status.OK),
        ([Status.OK, Status.WAIVED], Status.WAIVED),
        ([Status.WAIVED, Status.RUNNING], Status.RUNNING),
        ([Status.RUNNING, Status.FAILED], Status.FAILED),
        ([Status.FAILED, Status.WRONG_DATA, Status.OK], Status.WRONG_DATA),
    ],
)
def test_the_worst_part_decides(statuses: list[Status], expected: Status) -> None:
    assert worst(statuses) is expected
    assert worst(statuses[::-1]) is expected


def test_every_status_has_an_exit_code_a_text_and_an_end() -> None:
    codes = {Status.OK: ExitCode.OK, Status.WRONG_DATA: ExitCode.WRONG_DATA, Status.WAIVED: ExitCode.WAIVED}
    assert {status: status.exit_code for status in Status} == dict.fromkeys(Status, ExitCode.FAILED) | codes
    ended = {status for status in Status if status.has_ended}
    assert ended == {Status.OK, Status.WRONG_DATA, Status.WAIVED, Status.FAILED}
    assert set(COUNTED) == set(Status) - {Status.READY, Status.RUNNING}
    assert Status.WRONG_DATA.text == "wrong data"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), None),
        (("megatron",), "megatron"),
        (("megatron", "refit"), "refit"),
        (("refit", "megatron"), "refit"),
        (("megatron", "removed"), "removed"),
    ],
)
def test_which_engine_is_judged(names: tuple[str, ...], expected: str | None) -> None:
    assert judged_engine(names) == expected
    engines = {name: EngineResult(reason=name) for name in names}
    found = RefitResult(engines=engines)
    assert found.tested == (engines[expected] if expected else None)
    assert list(found.baselines) == [name for name in names if name != expected]
