"""What follows from results, on figures whose truth is known."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from refit.config.quantisation import Quantisation
from refit.config.side import SideSpec
from refit.report.refits.analysis import analyse, analysis_text, ep_against_tp, one_sided_against_two_sided, scaling
from refit.report.refits.analysis import separate_sets as separate
from refit.report.refits.points import points_of
from refit.report.refits.time_fit import FitError, Load, fit_time
from refit.results.outcomes import Outcome, judged
from refit.results.status import Status
from tests.report.factories import ENVIRONMENT, MODEL, planned, result, scenario, side, timed


def outcome(
    name: str,
    source: SideSpec,
    destination: SideSpec,
    median_s: float,
    mode: str = "non-collocated",
    method: str = "nvshmem",
    gb_per_s: float = 40.0,
    spread: float = 0.001,
    **figures: Any,
) -> Outcome:
    entry = planned(name, source, destination, mode, method)
    samples = [(1 - spread) * median_s, median_s, (1 + spread) * median_s]
    return judged(entry, result(entry, engines={"refit": timed(samples, gb_per_s=gb_per_s)}, **figures))


def test_the_fit_finds_the_costs_it_was_made_from() -> None:
    truth = [(1e9, 1000.0), (8e9, 1000.0), (2e9, 60_000.0), (66e9, 5000.0)]
    fit = fit_time([Load(nbytes, operations, 3e-6 * operations + nbytes / 45e9) for nbytes, operations in truth])
    assert fit.operation_s == pytest.approx(3e-6)
    assert fit.bytes_per_s == pytest.approx(45e9)
    assert fit.worst_error == pytest.approx(0, abs=1e-9)


def runs_of(name: str, *medians_s: float, **options: Any) -> list[Outcome]:
    """The runs of one scenario, as `--num-runs` makes them."""
    found = [
        outcome(f"{name}_run{number}", *SIDES, median_s, **options) for number, median_s in enumerate(medians_s, 1)
    ]
    return [replace(run, planned=replace(run.planned, run_of=name)) for run in found]


SIDES = side(2, 2), side(2, 1)


def test_runs_of_one_scenario_are_one_point() -> None:
    """Its time is the median of theirs, its refits are those of all, and its name has their number and spread."""
    ours = runs_of("ours", 0.1, 0.12, 0.1)
    (point,) = points_of(ours)
    assert (point.name, point.median_s) == ("ours (3 runs, spread 20.0 %)", 0.1)
    assert point.samples_s == [points_of([run])[0].samples_s[0] for run in ours]
    wrong = replace(ours[1], status=Status.WRONG_DATA)
    assert points_of([ours[0], wrong])[0].name == "ours (1 of 2 runs)"
    assert points_of([wrong]) == []


def test_runs_that_overlap_support_no_conclusion() -> None:
    """Refits of a run are within 2 % of each other; runs of one method are as fast as one of the other."""
    entries = [*runs_of("ours", 0.1, 0.13, 0.1), *runs_of("other", 0.12, 0.12, 0.12, method="nccl")]
    assert "(3 runs, spread 0.0 %) is within the spread of their refits" in analysis_text(entries)
    assert "within the spread" not in analysis_text([entries[0], entries[2], *entries[3:]])


def test_repeated_scenarios_are_compared_once() -> None:
    ours, other = runs_of("ours", 0.1, 0.1), runs_of("other", 0.2, 0.2, method="nccl")
    interleaved = [run for pair in zip(ours, other, strict=True) for run in pair]
    text = analysis_text(interleaved)
    assert text.count("nvshmem is 2.00 x as fast") == 1
    assert "2 scenarios" not in text, "a method with one scenario has one point"
    assert analysis_text(ours) == ""


def test_runs_under_other_versions_support_no_conclusion() -> None:
    ours = runs_of("ours", 0.1, 0.1)
    assert ours[1].result is not None
    newer = replace(ENVIRONMENT, versions={**ENVIRONMENT.versions, "torch": "9.9"})
    ours[1] = replace(ours[1], result=replace(ours[1].result, environment=newer))
    (line,) = one_sided_against_two_sided(points_of([*ours, *runs_of("other", 0.2, 0.2, method="nccl")]))
    assert "no conclusion: torch differs: " in line
    assert " / 9.9" in line


def test_the_fit_survives_noise_and_says_how_much_there_is() -> None:
    rng = random.Random(7)
    truth = [(10.0**power, operations) for power in (7, 8, 9, 10) for operations in (100.0, 1000.0, 10_000.0)]
    loads = [
        Load(nbytes, operations, (5e-6 * operations + nbytes / 45e9) * rng.uniform(0.97, 1.03))
        for nbytes, operations in truth
    ]
    fit = fit_time(loads)
    assert fit.operation_s == pytest.approx(5e-6, rel=0.03)
    assert fit.bytes_per_s == pytest.approx(45e9, rel=0.03)
    assert 0.005 < fit.worst_error < 0.05


@pytest.mark.parametrize(
    ("loads", "reason"),
    [
        ([], "at least two sizes"),
        ([Load(1e9, 10, 1)], "at least two sizes, there is 1 scenario"),
        ([Load(1e9, 10, 1), Load(1.01e9, 500, 2)], "2 scenarios of about one size"),
        ([Load(1e9, 10, 1), Load(4e9, 40, 4), Load(8e9, 80, 8)], "in step with the bytes"),
        ([Load(1e9, 10, 1), Load(4e9, 100, 1)], "negative cost"),
    ],
)
def test_the_fit_refuses_what_does_not_determine_it(loads: list[Load], reason: str) -> None:
    with pytest.raises(FitError, match=reason):
        fit_time(loads)


def test_scaling_reports_the_fit() -> None:
    sizes = [(1e9, 40_000), (10e9, 4_000), (40e9, 20_000)]
    outcomes = [
        outcome(
            f"size{nbytes:.0f}",
            side(2, 2),
            side(2, 2),
            4e-6 * transfers / 4 + nbytes / 50e9,
            busiest=int(nbytes),
            num_transfers=transfers,
        )
        for nbytes, transfers in sizes
    ]
    text = "\n".join(scaling(points_of(outcomes)))
    assert "time = 4 us x transfers per destination GPU + busiest rank's bytes / 50.0 GB/s (3 scenarios" in text
    assert "Of the largest, 40.00 GB in 5,000 transfers, 98 % of the time goes with the bytes." in text
    assert "run a third size" in "\n".join(scaling(points_of(outcomes[:2])))


def test_ep_against_tp() -> None:
    ep = [
        outcome(name, side(8, 8), side(8, 4), 1.4, gb_per_s=rate, bound_s=1.26)
        for name, rate in (("ep1", 44), ("ep2", 46))
    ]
    tp = outcome("tp", side(16, 4), side(8, 4), 1.5, gb_per_s=30, bound_s=0.75)
    both = outcome("both", side(16, 4), side(32, 2), 1.5, gb_per_s=1)
    lines = ep_against_tp(points_of([*ep, tp, both]))
    assert "only EP changes: 1.4 s, 45.0 GB/s at the busiest GPU, 90 % of" in lines[0]
    assert "(medians of 2: ep1, ep2)" in lines[0]
    assert "only TP changes: 1.5 s, 30.0 GB/s at the busiest GPU, 50 % of" in lines[1]
    assert lines[2].strip() == "EP moves its bytes 1.50 x as fast."
    assert ep_against_tp(points_of([*ep, both]))[0].startswith(
        "Not answered: needs a scenario in which only EP changes"
    )
    other_method = outcome("tp", side(16, 4), side(8, 4), 1.5, method="nccl")
    assert ep_against_tp(points_of([*ep, other_method]))[0].startswith("Not answered")


def test_rates_within_a_few_percent_are_called_equal() -> None:
    ep = outcome("ep", side(8, 8), side(8, 4), 1.4, gb_per_s=45)
    tp = outcome("tp", side(16, 4), side(8, 4), 1.5, gb_per_s=44)
    assert ep_against_tp(points_of([ep, tp]))[2].strip() == "Both move their bytes equally fast."


def test_what_separate_sets_cost() -> None:
    layouts = (side(2, 2), side(2, 1))
    apart = outcome("apart", *layouts, 0.3, payload=10_000_000_000)
    shared = outcome("shared", *layouts, 0.1, "collocated", payload=10_000_000_000, local=4_000_000_000)
    (line,) = separate(points_of([apart, shared]))
    assert line == (
        "apart on 6 GPUs takes 3.00 x the time of shared on 4: 300 ms against 100 ms; "
        "100 % of its bytes leave a GPU against 60 %."
    )
    elsewhere = outcome("elsewhere", side(4, 1), side(1, 1), 0.1, "collocated", payload=5_000_000_000)
    lines = separate(points_of([apart, elsewhere]))
    assert lines[0].startswith("non-collocated (nvshmem; 1 scenario): 60 ms per GB into each destination GPU, 100 %")
    assert lines[1].startswith("collocated (nvshmem; 1 scenario): 20 ms per GB")
    assert "Separate sets take 3.00 x as long per GB." in lines
    assert separate(points_of([apart]))[0].startswith("Not answered")


def test_nvshmem_against_nccl() -> None:
    layouts = (side(2, 2), side(2, 1))
    pair = [outcome("one", *layouts, 0.2), outcome("two", *layouts, 0.3, method="nccl")]
    (line,) = one_sided_against_two_sided(points_of(pair))
    assert line == "TP2 EP2 -> TP2 EP1, non-collocated: nvshmem 200 ms, nccl 300 ms: nvshmem is 1.50 x as fast."
    other_mode = outcome("two", *layouts, 0.3, "collocated", "nccl")
    assert one_sided_against_two_sided(points_of([pair[0], other_mode]))[0].startswith("Not answered")
    other = replace(scenario(pair[1].planned), model=replace(MODEL, num_layers=3))
    other_model = judged(pair[1].planned, result(pair[1].planned, scenario=other))
    assert one_sided_against_two_sided(points_of([pair[0], other_model]))[0].startswith("Not answered")


def test_what_was_not_measured_right_answers_nothing() -> None:
    wrong = judged(planned("wrong"), result(planned("wrong"), status=Status.WRONG_DATA))
    assert points_of([wrong]) == []
    assert analyse([wrong]) == []
    assert analysis_text([wrong]) == ""


def test_all_four_questions_are_in_the_text() -> None:
    text = analysis_text([outcome("ep", side(8, 8), side(8, 4), 1.4), outcome("tp", side(8, 8), side(4, 8), 1.4)])
    assert [line.split(":")[0] for line in text.splitlines() if line.endswith("?")] == [
        "EP against TP",
        "Non-collocated overhead",
        "Scaling",
        "NVSHMEM against NCCL",
    ]


def test_a_single_result_prints_no_questions() -> None:
    assert analysis_text([outcome("ep", side(8, 8), side(8, 4), 1.4)]) == ""


def test_no_conclusion_within_the_spread() -> None:
    layouts = (side(2, 2), side(2, 1))
    pair = [outcome("one", *layouts, 0.2, spread=0.15), outcome("two", *layouts, 0.22, method="nccl", spread=0.15)]
    (line,) = one_sided_against_two_sided(points_of(pair))
    assert line.endswith(
        "nccl 220 ms: no conclusion: the difference between one and two is within the spread of their refits."
    )
    noisy = [outcome("one", *layouts, 0.2, spread=0.5), outcome("two", *layouts, 9.0, method="nccl")]
    (line,) = one_sided_against_two_sided(points_of(noisy))
    assert line.endswith("no conclusion: the refits of one vary by 40.9 % (cv), more than 20 %.")
    (line,) = separate(points_of([outcome("a", *layouts, 0.2), outcome("b", *layouts, 0.2, "collocated")]))
    assert line == "a against b: no conclusion: the difference between a and b is within the spread of their refits."


def test_no_conclusion_from_few_refits() -> None:
    entries = [planned(method, side(2, 2), side(2, 1), method=method) for method in ("nvshmem", "nccl")]
    pair = [
        judged(entry, result(entry, [seconds, seconds])) for entry, seconds in zip(entries, (0.1, 0.2), strict=True)
    ]
    (line,) = one_sided_against_two_sided(points_of(pair))
    assert line.endswith("no conclusion: nvshmem has fewer than 3 measured refits.")


def test_no_conclusion_across_versions_or_gpus() -> None:
    other = replace(ENVIRONMENT, versions={**ENVIRONMENT.versions, "torch": "2.13.0"})
    layouts = (side(2, 2), side(2, 1))
    pair = [outcome("one", *layouts, 0.2), outcome("two", *layouts, 0.3, method="nccl", environment=other)]
    (line,) = one_sided_against_two_sided(points_of(pair))
    assert line.endswith("no conclusion: torch differs: 2.11.0 / 2.13.0.")
    ep = outcome("ep", side(8, 8), side(8, 4), 1.4, gb_per_s=45)
    tp = outcome("tp", side(16, 4), side(8, 4), 1.5, gb_per_s=30, environment=replace(ENVIRONMENT, gpus=()))
    assert ep_against_tp(points_of([ep, tp]))[2] == "  No conclusion: GPU differs: NVIDIA H100 80GB HBM3 / none."


def test_rates_are_called_equal_only_where_the_spread_would_show_a_difference() -> None:
    ep = outcome("ep", side(8, 8), side(8, 4), 1.4, gb_per_s=45, spread=0.15)
    tp = outcome("tp", side(16, 4), side(8, 4), 1.5, gb_per_s=44)
    assert ep_against_tp(points_of([ep, tp]))[2] == (
        "  No conclusion: the spread of the refits of ep hides differences of 5 %."
    )


def test_groups_that_disagree_give_no_conclusion() -> None:
    ep = [outcome(f"ep{rate}", side(8, 8), side(8, 4), 1.4, gb_per_s=rate) for rate in (20, 60)]
    tp = outcome("tp", side(16, 4), side(8, 4), 1.5, gb_per_s=30)
    assert ep_against_tp(points_of([*ep, tp]))[2] == (
        "  No conclusion: not all of these scenarios agree on which is faster."
    )


def test_a_fit_that_is_far_off_gives_no_conclusion() -> None:
    figures = [(1e9, 40_000, 0.05), (10e9, 4_000, 0.3), (40e9, 20_000, 0.8), (20e9, 4_000, 0.25)]
    outcomes = [
        outcome(f"s{number}", side(2, 2), side(2, 2), seconds, busiest=int(nbytes), num_transfers=transfers)
        for number, (nbytes, transfers, seconds) in enumerate(figures)
    ]
    (line,) = scaling(points_of(outcomes))
    assert "no conclusion: the best fit to 4 scenarios is off by" in line
    assert line.endswith("more than 15 %.")


def test_quantising_is_compared_with_the_same_refit_without_it() -> None:
    source, plain = side(2, 2), side(2, 1)
    block = replace(plain, quantisation=Quantisation("fp8-block", "amax"))
    refits = [outcome("bf16", source, plain, 0.1, busiest=100), outcome("fp8", source, block, 0.06, busiest=58)]
    question = "FP8: how much faster is a refit that quantises?"
    (line,) = {finding.question: finding.answer for finding in analyse(refits)}[question]
    assert line.startswith(
        "TP2 EP2 -> TP2 EP1, non-collocated, nvshmem: fp8-block 60 ms, without 100 ms: 1.67 x as fast"
    )
    assert line.endswith("with 58 % of the busiest GPU's bytes.")
    within = [outcome("bf16", source, plain, 0.1, busiest=0), outcome("fp8", source, block, 0.06, busiest=0)]
    (line,) = {finding.question: finding.answer for finding in analyse(within)}[question]
    assert line.endswith("without 100 ms: 1.67 x as fast.")
    noisy = [refits[0], outcome("fp8", source, block, 0.06, spread=0.9)]
    (line,) = {finding.question: finding.answer for finding in analyse(noisy)}[question]
    assert "no conclusion" in line
    alone = [refits[1], outcome("other", source, replace(block, layout=side(1, 1).layout), 0.06)]
    (line,) = {finding.question: finding.answer for finding in analyse(alone)}[question]
    assert line.startswith("Not answered")
    assert question not in {finding.question for finding in analyse([refits[0], outcome("b", source, source, 0.1)])}


def test_dtypes_are_not_mixed_in_what_layouts_and_modes_are_compared_by() -> None:
    """Only EP changes in BF16 and only TP in FP8: that answers nothing."""
    block = replace(side(1, 2), quantisation=Quantisation("fp8-block", "amax"))
    points = points_of([outcome("ep", side(2, 2), side(2, 1), 0.1), outcome("tp", side(2, 2), block, 0.05)])
    assert ep_against_tp(points)[0].startswith("Not answered")
    points = points_of([outcome("a", side(2, 2), side(2, 1), 0.1), outcome("b", side(2, 2), block, 0.05, "collocated")])
    assert separate(points) == ["Not answered: needs scenarios of the same model in both modes."]
