"""Skipping is for other people's machines: in CI, a test skipped for a reason that is not listed here has failed."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

EXPECTED = (
    "0.16 builds it",  # one Megatron-Core or the other; CI runs both
    "0.19 plans it",
    "0.19 has the flags",
    "needs a Slurm of its own: make slurm-test",  # a part of .ci/run
    "needs two GPUs",
    "no CUDA GPU",
    "no vLLM environment: make test-vllm",  # a part of .ci/run
    "vLLM is not installed",
)
"""Why a test may be skipped in CI, whose machine has no GPU."""


def judged(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a report of a skip for another reason into one of a failure, where CI=true."""
    if os.environ.get("CI") != "true" or not report.skipped or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if reason not in EXPECTED:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {reason}\ninstall what it needs in .ci/run, or add the reason to {__name__}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    judged(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    judged(report)
    return report
