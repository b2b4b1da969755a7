"""What is printed of refits that send changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refit.report.refits.delta_lines import delta_headline, delta_lines, percent, ratio
from refit.report.refits.headline import headlines
from refit.report.refits.refit_lines import closing_lines
from refit.results.delta import Changed, DeltaSample
from refit.results.refit import EngineResult, RefitResult, Sample
from refit.results.result import Result
from refit.results.runs import outcome_of
from refit.results.shares import kind_rows, share_rows
from refit.results.stats import summarise
from refit.results.status import Status
from tests.report.factories import engine as timed_on
from tests.report.factories import small_run, timed

WIRE = 30_000_000_000


def changes(iteration: int, seconds: float, asked: float | None, **found: object) -> Sample:
    """A refit of two ranks; full where `asked` is None."""
    is_full = asked is None
    share = 1.0 if asked is None else asked
    delta = DeltaSample(
        asked_share=asked,
        num_elements=1000,
        num_changed=None if is_full else round(1000 * share),
        place_bytes=0 if is_full else round(WIRE * share),
        value_bytes=round(WIRE * share),
        find_s=0.25 * seconds,
        pack_s=0.125 * seconds,
        apply_s=0.125 * seconds,
        snapshot_bytes=WIRE // 4,
        num_full=4 if is_full else 0,
        full_because="rank 0: nothing was sent before" if is_full else None,
    )
    sent = WIRE if is_full else round(2.1 * WIRE * share)
    return Sample(
        iteration, iteration < 1, (seconds, *[seconds / 2] * 7), 0, {}, 0.0, 100, 0, {}, sent, WIRE, delta=delta
    )


def engine(*samples: Sample) -> EngineResult:
    found = EngineResult(status=Status.OK, cold_s={"plan": 0.1}, samples=samples)
    return replace(found, summary=summarise(found.measured_s))


TWO_SHARES = engine(
    changes(0, 0.5, None),
    *(changes(1 + 2 * turn, 0.01 + turn / 1000, 0.01) for turn in range(3)),
    *(changes(2 + 2 * turn, 0.4, 0.5) for turn in range(3)),
)
FULL = timed_on([[seconds] * 8 for seconds in (0.31, 0.34, 0.37)])


def run_of(**engines: EngineResult) -> Result:
    return small_run(**engines)


def refit_of(result: Result) -> RefitResult:
    assert result.refit is not None
    return result.refit


def test_each_share_has_a_row_with_its_bytes_and_times() -> None:
    one, half = share_rows(refit_of(run_of(refit=TWO_SHARES, full=FULL)))
    assert (one.asked_share, one.num_refits, one.changed_share, one.num_full) == (0.01, 3, 0.01, 0)
    assert (one.byte_share, one.place_bytes, one.value_bytes) == (0.021, 0.01 * WIRE, 0.01 * WIRE)
    assert one.median_s == 0.011
    assert one.speedup == pytest.approx(0.34 / 0.011)
    assert one.find_s + one.pack_s + one.move_s + one.apply_s == pytest.approx(one.median_s)
    assert (half.median_s, half.speedup) == (0.4, pytest.approx(0.85))


def test_times_and_headline_are_those_of_the_first_share() -> None:
    result = run_of(refit=TWO_SHARES, full=FULL)
    assert TWO_SHARES.measured_s == [0.01, 0.011, 0.012]
    assert TWO_SHARES.num_timed == 6
    assert delta_headline(refit_of(result)) == "1.0 % changed, 2.1 % of the bytes, 31 x as fast as full in this run"
    ours, full = headlines(outcome_of("run", result))
    assert "11.0 ms median (10.0-12.0, 3 refits), 1.0 % changed, 2.1 % of the bytes, 31 x as fast as full" in ours
    assert "by full refit" in full
    assert "changed" not in full


def test_what_is_in_doubt_is_compared_with_nothing() -> None:
    wrong = timed([0.31, 0.34, 0.37], num_wrong=3)
    refit = refit_of(run_of(refit=TWO_SHARES, full=wrong))
    assert [row.speedup for row in share_rows(refit)] == [None, None]
    assert delta_headline(refit) == "1.0 % changed, 2.1 % of the bytes"
    doubtful = replace(TWO_SHARES, samples=tuple(replace(each, num_wrong=1) for each in TWO_SHARES.samples))
    assert [row.speedup for row in share_rows(refit_of(run_of(refit=doubtful, full=FULL)))] == [None, None]


def test_the_log_says_what_was_sent_and_why_it_was_everything() -> None:
    result = run_of(refit=TWO_SHARES, full=FULL)
    text = "\n".join(closing_lines(refit_of(result), result))
    assert "Full refit in this run: 340.00 ms for 30.00 GB between ranks" in text
    assert "Snapshot of what was sent: 7.50 GB on the rank with most" in text
    assert "Sent in full: 1 of 7 refits: rank 0: nothing was sent before" in text
    assert "of at most" not in text
    assert "Ratio" not in text


def test_a_measured_refit_that_sent_everything_has_no_share() -> None:
    base = changes(1, 0.5, 0.01).delta
    assert base is not None
    whole = replace(base, num_changed=None, num_full=1, full_because="rank 1: the refit before did not end")
    again = engine(changes(0, 0.5, None), replace(changes(1, 0.5, 0.01), delta=whole))
    refit = refit_of(run_of(refit=again))
    assert share_rows(refit)[0].changed_share is None
    assert delta_headline(refit).startswith("everything sent")
    assert "rank 1: the refit before did not end" in delta_lines(refit)[-1]


def test_what_optimizer_steps_change_has_a_row_for_each_kind() -> None:
    def after(step: int, *changed: int) -> Sample:
        sample = changes(step, 0.01, None)
        assert sample.delta is not None
        kinds = dict(zip(("experts", "norms"), (Changed(1000, count) for count in changed), strict=True))
        return replace(sample, delta=replace(sample.delta, num_changed=10, num_full=0, by_kind=kinds))

    refit = refit_of(run_of(refit=engine(changes(0, 0.5, None), after(1, 20, 0), after(2, 40, 1)), full=FULL))
    experts, norms, total = kind_rows(refit)
    assert (experts.kind, experts.num_elements, experts.mean, experts.least, experts.most) == (
        *("experts", 1000),
        *(pytest.approx(share) for share in (0.03, 0.02, 0.04)),
    )
    assert (norms.kind, norms.mean) == ("norms", 0.0005)
    assert (total.kind, total.num_elements, total.mean) == ("all", 2000, pytest.approx(0.01525))
    assert delta_headline(refit).startswith("1.0 % changed by a step (experts 3.0, norms 0.05), ")
    text = "\n".join(delta_lines(refit))
    assert "Changed by one optimizer step, by kind of tensor" in text


def test_other_refits_have_no_such_lines() -> None:
    refit = refit_of(run_of(refit=FULL))
    assert (share_rows(refit), delta_lines(refit), delta_headline(refit)) == ([], [], "")


@pytest.mark.parametrize(
    ("share", "text"), [(0.0001, "0.01"), (0.0035, "0.35"), (0.01, "1.0"), (0.0207, "2.1"), (0.28, "28"), (1.0, "100")]
)
def test_shares_have_two_digits(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("number", "text"), [(0.82, "0.82"), (3.42, "3.4"), (31.2, "31")])
def test_ratios_have_two_digits(number: float, text: str) -> None:
    assert ratio(number) == text
