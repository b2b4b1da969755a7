"""The HTML report: one file that needs nothing else, with every result, every picture and the environment."""

from __future__ import annotations

import base64
import builtins
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from refit.commands import main
from refit.report.refits.headline import headlines
from refit.report.refits.page import POLICY, Pictures, page
from refit.results.runs import Run, find_run
from tests.report.factories import planned, result, write_result
from tests.report.refits.test_summary import full_run

VOID = ("meta", "img", "br")
PNG = b"\x89PNG\r\n\x1a\n"


class Document(HTMLParser):
    """The tags, the attributes and the text of a page, whose tags must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self._open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture
def full(tmp_path: Path) -> Run:
    full_run(tmp_path)
    return find_run(tmp_path)


def test_a_page_needs_nothing_but_itself(full: Run, tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    picture.write_bytes(PNG)
    text = page([full], [Pictures((picture,))])
    document = Document(text)
    assert document.values("src") == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert document.values("href") == []
    assert not {"script", "link", "iframe"} & document.tags.keys()
    assert POLICY in document.values("content")
    assert not re.search(r"url\(|@import|https?:", text)


def test_a_page_has_every_headline_the_tables_and_the_environment(full: Run) -> None:
    document = Document(page([full], [Pictures(missing=("cut_off: no bytes",))]))
    for outcome in full.outcomes:
        assert all(line in document.text for line in headlines(outcome))
    assert document.tags["tr"] == 1 + 11 + 7, "the header, the engines, one environment for all scenarios"
    assert Counter(document.values("class"))["valid"] == 2
    for word in ("NVIDIA H100 80GB HBM3", "2.11.0", "NCCL_NVLS_ENABLE", "node001", "No picture: cut_off: no bytes"):
        assert word in document.text
    assert "EP against TP" in document.text


def test_results_that_do_not_count_are_marked(full: Run) -> None:
    text = page([full], [Pictures()])
    rows = re.findall(r'<tr( class="invalid")?><td class="text name">(\w+)', text)
    assert [name for state, name in rows if not state] == ["TP8_EP8_to_TP8_EP4_64to32", "TP16_EP8_to_TP8_EP16_128"]


def test_the_command_draws_the_pictures_of_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        write_result(tmp_path / f"{name}.json", result(planned(name)))
    assert main(["report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--format", "html"]) == 0
    document = Document(capsys.readouterr().out)
    shown = [name for name in document.values("alt") if name]
    assert shown.count("times") == 2
    assert {"a_bytes", "b_bytes"} <= set(shown)
    assert len(document.values("src")) == len(shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"], "nothing is left behind"


def test_without_matplotlib_the_page_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)

    write_result(tmp_path / "a.json", result(planned("a")))
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", str(tmp_path), "--format", "html"]) == 0
    document = Document(capsys.readouterr().out)
    assert "No picture: pictures need matplotlib" in document.text
    assert document.tags["img"] == 0


def test_what_all_rows_share_is_said_once_and_what_none_has_not_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_result(tmp_path / f"{name}.json", result(planned(name)))
    text = page([find_run(tmp_path)], [Pictures()])
    titles = re.findall(r"<th[^>]*>([^<]*)</th>", text.partition("</thead>")[0])
    assert titles == ["scenario", "#wrong", "median (ms)"], "all else is equal"
    assert "In every row: source TP8 EP8 (64), target TP8 EP4 (32), mode non-collocated, method nvshmem" in text
    assert "lower bound (ms)" not in text, "none has one"


def test_one_page_has_the_facts_the_table_and_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    full_run(tmp_path)
    assert main(["report", str(tmp_path), "--format", "html", "--one-page"]) == 0
    document = Document(capsys.readouterr().out)
    assert [name for name in document.values("alt") if name] == ["times"]
    assert document.tags["table"] == 1
    for word in ("Hardware: NVIDIA H100 80GB HBM3", "torch 2.11.0", "#wrong", "Megatron-Core", "168"):
        assert word in document.text
    assert main(["report", str(tmp_path), "--one-page"]) == 2
    assert "--one-page is a page to print: give --format html with it" in capsys.readouterr().err


def test_a_page_is_not_written_to_a_terminal(
    full: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refit.report.terminal.live.is_terminal", lambda _: True)
    assert main(["report", str(full.directory), "--format", "html"]) == 2
    assert "add > report.html" in capsys.readouterr().err


def test_latex_is_a_table_with_its_facts_and_every_sign_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full_run(tmp_path)
    assert main(["report", str(tmp_path), "--format", "latex"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None
    assert len(rows) == 1 + 11
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns[1]) - 1}
    assert r"& \#wrong &" in text
    assert r"Model: kimi\_k2" in text
    assert "Hardware: NVIDIA H100 80GB HBM3" in text
    assert not re.search(r"(?<!\\)[_%#$]", text)
