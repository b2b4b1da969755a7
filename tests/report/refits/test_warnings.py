"""Each warning where it belongs, not where it does not, and remedies that hold."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from refit.cli.parsing import parse
from refit.report.refits.warnings import idle_ranks, of_engine
from refit.results.refit import EngineResult, HostTraffic
from tests.report.factories import engine, small_run

IDLE = [0.0, 0.0]


def steady(*totals: float) -> list[list[float]]:
    """Each refit with its slowest rank's seconds, alternately rank 4 and 5."""
    return [[0.1] * 4 + ([t, 0.9 * t] if k % 2 else [0.9 * t, t]) + IDLE for k, t in enumerate(totals)]


def warnings_of(measured: EngineResult, name: str = "refit", busier: dict[int, int] | None = None) -> list[str]:
    """The warnings on one engine of a run of `measured`, in which ranks of `busier` send that many bytes."""
    run = small_run(**{"refit": measured, name: measured})
    assert run.scenario is not None
    assert run.refit is not None
    assert run.refit.plan is not None
    plan = replace(run.refit.plan, sent_by_rank={**run.refit.plan.sent_by_rank, **(busier or {})})
    return of_engine(name, measured, run.scenario, replace(run.refit, plan=plan))


def test_steady_times_need_no_warning() -> None:
    assert warnings_of(engine(steady(1.0, 1.01, 1.0, 0.99, 1.0))) == []


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (engine(steady(1.0, 1.0, 1.0, 1.0, 1.0), num_warmup=0), ["no warm-up: "]),
        (engine(steady(1.0, 1.0, 1.0)), ["3 measured refits say little"]),
        (engine(steady(2.0, 1.0, 1.0, 1.0, 1.0)), ["the first measured refit took 2.0 x", "times vary by 33 % (cv)"]),
        (engine(steady(1.0, 1.2, 1.0, 1.2, 1.0)), ["times vary by 9 % (cv)"]),
        (engine(steady(1.0, 1.0, 1.03, 1.03, 1.06, 1.06)), ["refits get slower by 6 %"]),
        (engine(steady(1.06, 1.06, 1.03, 1.03, 1.0, 1.0)), ["refits get faster by 6 %"]),
    ],
    ids=["no warm-up", "few", "slow first", "spread", "slower", "faster"],
)
def test_times_that_say_less_than_they_seem_to(measured: EngineResult, expected: list[str]) -> None:
    lines = warnings_of(measured)
    assert len(lines) == len(expected), lines
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith(f"warning: {text}")
        assert re.search(r"--num-benchmark-(warmup|iterations) \d+", line)


def test_what_a_transport_found_slow_comes_first() -> None:
    slow = "NIXL writes within a host over tcp/lo: 0.90 GB/s from rank 0, whose own memory is copied at 6.10 (UCX_TLS)"
    lines = warnings_of(replace(engine(steady(1.0, 1.0)), slow=slow))
    assert lines[0] == f"warning: {slow}"
    assert len(lines) == 2


def test_with_two_engines_a_line_says_whose_it_is() -> None:
    (line,) = warnings_of(engine(steady(1.0, 1.0)), "megatron")
    assert line.startswith("warning: Megatron-Core: 2 measured refits")


def straggling(rank: int, times: int, factor: float) -> EngineResult:
    """Five refits, in the first `times` of which source `rank` is slower than the other sources by `factor`."""
    base = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, *IDLE]
    slow = [factor if each == rank else seconds for each, seconds in enumerate(base)]
    other = [factor if each == (rank + 1) % 4 else seconds for each, seconds in enumerate(base)]
    return engine([slow] * times + [other] * (5 - times))


def test_a_straggler_is_named() -> None:
    (line,) = warnings_of(straggling(2, 4, 1.5))
    assert line.startswith(
        "warning: rank 2 was slowest in 4 of 5 refits, 1.50 x the median rank of its side with 1.00 x its bytes: "
    )


def test_a_slow_host_is_named_unless_its_bytes_explain_it() -> None:
    """The destination has rank 4 on host a and rank 5 on host b."""
    measured = engine([[0.1] * 4 + [0.1, 0.21] + IDLE for _ in range(4)])
    run = small_run(refit=measured)
    assert run.scenario is not None
    assert run.refit.plan is not None
    refit = replace(run.refit, hosts=HostTraffic({"a": 5, "b": 3}, "off", 1, 1, 1))
    (line,) = (each for each in of_engine("refit", measured, run.scenario, refit) if "slowest" in each)
    assert line.startswith(
        "warning: host b was slowest in 4 of 4 refits, 2.10 x the median of the other 1 with 1.00 x "
    )
    busier = replace(run.refit.plan, received_by_rank={4: 100, 5: 300})
    assert not any("host b" in each for each in of_engine("refit", measured, run.scenario, replace(refit, plan=busier)))
    assert not any("host" in each for each in of_engine("refit", measured, run.scenario, run.refit))


def test_ranks_that_take_turns_or_are_hardly_slower_are_no_stragglers() -> None:
    assert warnings_of(straggling(2, 2, 1.5)) != []  # then its neighbour is
    assert warnings_of(straggling(2, 5, 1.1)) == []
    measured = engine(
        [[1.5 if rank == number % 4 else 1.0 for rank in range(4)] + [0.5, 0.5, *IDLE] for number in range(5)]
    )
    assert warnings_of(measured) == []


def test_a_rank_with_more_bytes_may_take_longer() -> None:
    measured = straggling(2, 5, 1.5)
    assert warnings_of(measured) != []
    assert warnings_of(measured, busier={2: 10_500_000_000}) == []


TINY = "--model tiny --refit-method gloo --tensor-model-parallel-size 2 --expert-model-parallel-size 2"


def test_no_idle_rank_no_line() -> None:
    assert idle_ranks(parse(TINY.split()).scenario, 8) == ""


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        (
            "--rl-inference-expert-model-parallel-size 1",
            8,
            "warning: ranks 6-7 do nothing, 4 + 2 = 6 of 8 are used: start 6 ranks, or use them all with "
            "--rl-inference-expert-model-parallel-size 2",
        ),
        ("", 9, "warning: rank 8 does nothing, 4 + 4 = 8 of 9 are used: start 8 ranks"),
        (
            "--refit-mode collocated",
            8,
            "warning: ranks 4-7 do nothing, max(4, 4) = 4 of 8 are used: start 4 ranks, or use them all with "
            "--rl-inference-expert-model-parallel-size 4",
        ),
        (
            "--num-experts 2 --rl-inference-tensor-model-parallel-size 1",
            8,
            "warning: ranks 6-7 do nothing, 4 + 2 = 6 of 8 are used: start 6 ranks, or use them all with "
            "--rl-inference-tensor-model-parallel-size 2",
        ),
        (
            "--tensor-model-parallel-size 1 --rl-inference-tensor-model-parallel-size 2",
            8,
            "warning: ranks 6-7 do nothing, 2 + 4 = 6 of 8 are used: start 6 ranks, or use them all with "
            "--expert-model-parallel-size 4 --rl-inference-expert-model-parallel-size 2",
        ),
    ],
    ids=["EP", "nothing fits", "shared", "EP does not divide, TP does", "the source"],
)
def test_idle_ranks_and_what_would_use_them(flags: str, world_size: int, expected: str) -> None:
    scenario = parse([*TINY.split(), *flags.split()]).scenario
    assert idle_ranks(scenario, world_size) == expected
    for remedy in re.findall(r"use them all with (.+)$", expected):  # of a flag given twice the last one counts
        assert parse([*TINY.split(), *flags.split(), *remedy.split()]).scenario.num_ranks == world_size
