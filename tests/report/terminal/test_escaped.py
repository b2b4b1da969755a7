"""Text from files does nothing on terminals, in spreadsheets, in Markdown and in pictures."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.commands import main
from refit.report.terminal.escaped import csv_cell, html_text, markdown_code, markdown_text, plain_lines
from refit.report.terminal.grid import Column, comma_separated, fitted
from refit.results.plain import plain
from refit.results.result import Failure, Gpu
from refit.results.status import Status
from tests.report.factories import ENVIRONMENT, planned, result, write_result

HOSTILE = "=cmd|'/c calc'!A1 \x1b]0;owned\x07\x1b[2J <img src=x onerror=alert(1)> `|` [a](javascript:b)\n| row |\u202e"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("TP8 \u00fc \u2192", "TP8 \u00fc \u2192"),
        ("\x1b[2Ja\x9b", "\\x1b[2Ja\\x9b"),
        ("a\r\nb\tc", "a  b c"),
        ("\ud800\u202e\u2028", "\\ud800\\u202e\\u2028"),
    ],
)
def test_plain_text(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(st.characters()))
def test_any_text_is_one_printable_line(text: str) -> None:
    cell, page = str(csv_cell(text)), html_text(text)
    for shown in (plain(text), plain_lines([text]), markdown_text(text), markdown_code(text), cell, page):
        assert len(shown.splitlines()) <= 1
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", shown)


def test_long_text_is_cut() -> None:
    assert plain("x" * 5000) == "x" * 2000 + " ..."
    assert len(fitted([Column("a")], [["x" * 5000]], 1000).splitlines()[1]) < 320


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-cmd", "@SUM(A1)", "\t=1", "\r=1", " =1", "--flag"])
def test_formulas_are_text_in_csv(text: str) -> None:
    (_, row) = csv.reader(io.StringIO(comma_separated(("a",), [(text,)])))
    assert row[0].startswith("'")


@pytest.mark.parametrize("value", ["-1.5", "+3", "-1e9", -2.5, None, 7, "TP2", "a=b"])
def test_numbers_and_other_text_stay_as_they_are(value: object) -> None:
    assert csv_cell(value) == value


@given(st.text(st.characters()))
def test_any_text_is_text_in_html(text: str) -> None:
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.handle_starttag = lambda tag, attributes: found.append(str((tag, attributes)))  # type: ignore[method-assign]
    parser.feed(f'<p title="{html_text(text)}">{html_text(text)}</p>')
    parser.close()
    assert found[0] == str(("p", [("title", plain(text))]))
    assert "".join(found[1:]) == plain(text)


def test_markdown_shows_signs_as_they_are() -> None:
    assert markdown_text("<b>a|b`c`[x](y) &") == "&lt;b&gt;a\\|b\\`c\\`\\[x\\](y) &amp;"
    assert markdown_code("a`b|c") == "`a'b\\|c`"


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "json", "html"])
def test_a_hostile_result_is_reported_harmlessly(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = replace(ENVIRONMENT, host=HOSTILE, gpus=(Gpu(HOSTILE),), variables={"SLURM_JOB_ID": HOSTILE})
    failed = result(planned("a"), status=Status.FAILED, failure=Failure(HOSTILE), environment=environment)
    write_result(tmp_path / "=a|`<b>\x1b.json", failed)
    assert main(["report", str(tmp_path), "--format", form]) == 0
    shown = capsys.readouterr().out
    assert not any(ord(character) < 32 and character != "\n" for character in shown)
    assert "\u202e" not in shown
    if form == "markdown":
        assert "<img" not in shown
        rows = [line for line in shown.splitlines() if line.startswith("|")]
        assert len(rows) == 3
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {18}
    if form == "csv":
        (row,) = csv.DictReader(io.StringIO(shown))
        assert row["scenario"].startswith("'=a|")
        assert row["reason"].startswith("'=cmd")
    if form == "json":
        assert shown.isascii()
        (record,) = json.loads(shown)
        assert record["reason"].startswith("=cmd"), "JSON keeps text as it is, escaped"
    if form == "html":
        assert not re.search(r"<(img src=x|b>|script)", shown)
        assert "&lt;img src=x onerror=alert(1)&gt;" in shown


def test_a_hostile_value_in_an_error_is_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"run_id": "a", "status": "\\u001b[2J"}')
    assert main(["report", str(path)]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_compare_names_what_differs_harmlessly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, versions in (("a", {"torch": "1"}), ("b", {"torch": HOSTILE})):
        write_result(
            tmp_path / f"{name}.json", result(planned("x"), environment=replace(ENVIRONMENT, versions=versions))
        )
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "torch differs: 1 / =cmd" in shown
