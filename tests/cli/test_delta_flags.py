"""The flags of refits that send what has changed: what they mean, and what is refused in one line."""

from __future__ import annotations

import pytest

from refit.cli.main import main
from refit.cli.parsing import parse
from refit.config.delta import DeltaOptions, Pattern, Snapshot
from refit.config.scenario import Scenario
from tests.cli.lines import TWO_HEADS

DELTA = "--refit-encoding delta"


def scenario(flags: str) -> Scenario:
    return parse(f"{TWO_HEADS} {flags}".split()).scenario


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (DELTA, DeltaOptions()),
        (f"{DELTA} --delta-changed-share 0.1% --delta-changed-share 0.05", DeltaOptions((0.001, 0.05))),
        (f"{DELTA} --delta-changed-share 100%", DeltaOptions((1.0,))),
        (f"{DELTA} --delta-pattern experts", DeltaOptions(pattern=Pattern.EXPERTS)),
        (f"{DELTA} --delta-snapshot host --refit-method nccl", DeltaOptions(snapshot=Snapshot.HOST)),
        ("--refit-encoding auto", DeltaOptions()),
        ("", None),
    ],
)
def test_settings_are_those_of_the_flags(flags: str, options: DeltaOptions | None) -> None:
    assert scenario(flags).delta == options


def test_changes_are_compared_with_full_refits_unless_engines_are_named() -> None:
    assert scenario(DELTA).engines == ("refit", "full")
    assert scenario(f"{DELTA} --refit-engine refit").engines == ("refit",)
    assert scenario("").engines == ("refit",)


def test_auto_tries_before_it_is_timed() -> None:
    assert scenario("--refit-encoding auto").num_warmup == 6
    assert scenario(DELTA).num_warmup == 2
    assert scenario(f"{DELTA} --num-benchmark-warmup 1").num_warmup == 1


def test_changes_are_made_up_or_those_of_optimizer_steps() -> None:
    steps = f"{DELTA} --seq-length 16 --global-batch-size 8 --micro-batch-size 1 --measure"
    assert scenario(f"{steps} train-step,refit").sends_steps
    assert not scenario(f"{steps} refit,forward").sends_steps
    assert not scenario(DELTA).sends_steps


REFUSED = [
    (
        f"{DELTA} --measure train-step,refit --delta-changed-share 2%",
        "--delta-changed-share makes changes up, --measure train-step,refit sends those of optimizer steps: leave one",
    ),
    (f"{DELTA} --measure train-step,refit --delta-pattern rows", "--delta-pattern makes changes up"),
    (f"{DELTA} --delta-changed-share 0", "--delta-changed-share: must be above 0 % and at most 100 %, got '0'"),
    (f"{DELTA} --delta-changed-share 101%", "must be above 0 % and at most 100 %, got '101%'"),
    (f"{DELTA} --delta-changed-share=-1%", "must be above 0 % and at most 100 %, got '-1%'"),
    (f"{DELTA} --delta-changed-share 1.5", "must be above 0 % and at most 100 %, got '1.5'"),
    (f"{DELTA} --delta-changed-share nan", "must be above 0 % and at most 100 %, got 'nan'"),
    (f"{DELTA} --delta-changed-share few", "expected a share such as 1% or 0.01, got 'few'"),
    ("--delta-changed-share 1%", "--delta-changed-share needs --refit-encoding delta or auto"),
    ("--delta-pattern rows", "--delta-pattern needs --refit-encoding delta or auto"),
    (f"{DELTA} --delta-pattern diagonal", "--delta-pattern: invalid choice: 'diagonal'"),
    (f"{DELTA} --delta-snapshot host --refit-method gloo", "--delta-snapshot host is for weights on GPUs"),
    (f"{DELTA} --refit-engine refit,megatron", "--refit-engine megatron sends weights as they are"),
    (f"{DELTA} --refit-engine nccl-m2n", "--refit-engine nccl-m2n sends weights as they are"),
    (f"{DELTA} --refit-engine full", "--refit-engine full alone leaves --refit-encoding delta out"),
    ("--refit-engine refit,full", "--refit-engine full sends everything, as the others do"),
    (f"{DELTA} --num-benchmark-warmup 0", "--num-benchmark-warmup 0 < 1: --refit-encoding delta sends everything at"),
    ("--refit-encoding auto --num-benchmark-warmup 5", "--num-benchmark-warmup 5 < 6: --refit-encoding auto tries"),
    (f"{DELTA} --measure forward", "needs a refit: add refit to --measure"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_is_refused_is_refused_in_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    method = [] if "--refit-method" in flags else ["--refit-method", "gloo"]
    assert main(["--model", "tiny", *method, *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
