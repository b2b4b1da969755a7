"""What a log says of a running engine."""

from __future__ import annotations

from dataclasses import replace

from refit.report.refits.refit_lines import iteration_line, verdict
from refit.report.refits.served_lines import engine_lines, served_line
from refit.results.refit import EngineResult, Sample
from refit.results.serving import Served, ServedCheck
from refit.results.stats import summarise
from refit.results.status import Status

AROUND = {"pause": 0.001, "commit": 0.02, "cache reset": 0.002, "resume": 0.0005}
SAMPLE = Sample(0, False, (0.01, 0.005), 0, {"wait": 0.009}, 0.001, 100, 0, around_s=AROUND, engine_compared=50)
CHECK = ServedCheck(True, None, "transformers 5 in float32, the engine in bfloat16", 2, 110, 0, 0, 0.07, 0.25)
SERVED = Served("0.32.0", 2, ("norm",), ("embed",), ("qkv", "experts"), {"linears": 0.015}, 0.0335)
ENGINE = EngineResult(status=Status.OK, samples=(SAMPLE,), summary=summarise([0.01]), served=SERVED)


def test_the_pause_is_the_refit_and_all_around_it() -> None:
    assert SAMPLE.pause_s is not None
    assert round(SAMPLE.pause_s, 6) == 0.0335
    assert replace(SAMPLE, around_s={}).pause_s is None
    assert "10.00 ms, engine pause 33.50 (slowest rank 0" in iteration_line("refit", SAMPLE, "1/1")


def test_an_engine_is_described_with_its_phases() -> None:
    first, pause, inside = engine_lines("refit", ENGINE)
    assert first.endswith(
        "vLLM 0.32.0 with 2 workers: 1 kinds of parameters written live, 1 copied and 2 packed at commit"
    )
    assert pause == (
        "Engine pause: 33.50 ms median (pause 1.00, refit 10.00, commit 20.00, cache reset 2.00, resume 0.50; commit "
        "by layers: linears 15.00)"
    )
    assert inside.endswith("50 live elements compared, 0 wrong")
    assert engine_lines("refit", replace(ENGINE, served=None)) == []


def test_what_is_wrong_in_the_engine_is_the_verdict() -> None:
    wrong = replace(ENGINE, samples=(replace(SAMPLE, engine_wrong=3),))
    assert (wrong.verdict, wrong.fault) == (Status.WRONG_DATA, "3 elements wrong in the engine")
    assert verdict("refit", wrong, "full").startswith(
        "FAILED (refit): 100 elements compared over 1 refits, 0 wrong; 3 wrong in"
    )
    assert "3 WRONG" in iteration_line("refit", wrong.samples[0], "1/1")


def test_a_check_of_what_it_generates() -> None:
    assert served_line("refit", replace(SERVED, check=CHECK)) == (
        "Forward check (refit) passed: 110 of 110 tokens of the running engine agree, of prompts and generated, for 2 "
        "sets of weights in turn; largest difference 0.07 nats, tolerance 0.25: " + CHECK.reference
    )
    failed = replace(
        CHECK, passed=False, num_wrong=9, difference=None, first_wrong="prompt token 2, weights 1: nan for -7"
    )
    engine = replace(ENGINE, served=replace(SERVED, check=failed))
    assert engine.verdict is Status.WRONG_DATA
    assert engine.served is not None
    assert "FAILED: 101 of 110 tokens" in served_line("refit", engine.served)
    assert "first prompt token 2, weights 1: nan for -7" in verdict("refit", engine, "full")
    waived = replace(SERVED, check=ServedCheck(True, "no transformers"))
    assert served_line("refit", waived).endswith("waived: no transformers")
