"""What people see: lines that fit a terminal of 80 or 120 columns, with colour there and only there."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.cli.main import main as benchmark
from refit.commands import main
from refit.report.refits.refit_lines import closing_lines
from refit.report.steps.dispatchers import dispatcher_text
from refit.report.steps.trainers import trainer_text
from refit.report.terminal import grid
from refit.report.terminal.console import show, show_text, table_width, wrapped
from refit.report.terminal.escaped import FILE_WIDTH
from refit.report.terminal.grid import Column, fitted
from tests.report.factories import engine, small_run
from tests.report.refits.test_summary import full_run
from tests.report.steps import test_dispatchers as dispatched
from tests.report.steps import test_trainers as trained

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
TABLE = (Column("scenario", is_text=True), *(Column(f"column {number}", "(ms)") for number in range(14)))


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], str]:
    """Runs a function with standard output on a terminal of so many columns; gives what it printed."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(columns: int, call: Callable[[], object]) -> str:
        leader, follower = os.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        os.set_blocking(leader, False)
        printed = b""

        class Terminal(io.TextIOWrapper):
            def flush(self) -> None:  # the terminal's own buffer is small: it is read as it fills
                nonlocal printed
                super().flush()
                while True:
                    try:
                        printed += os.read(leader, 1 << 16)
                    except BlockingIOError:
                        return

            def write(self, text: str) -> int:
                for start in range(0, len(text), 1000):
                    super().write(text[start : start + 1000])
                    self.flush()
                return len(text)

        with Terminal(os.fdopen(follower, "wb"), encoding="utf-8") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            call()
            stream.flush()
        os.close(leader)
        return printed.decode().replace("\r\n", "\n")

    return run


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    dry_run = "--dry-run --model tiny --tensor-model-parallel-size 2 --gpus-per-node 2 --cluster h100_ib400"
    run = small_run(refit=replace(engine([[0.04] * 8] * 3), share_of_lower_bound=0.96), megatron=engine([[0.1] * 8]))
    assert run.refit is not None
    refit = run.refit
    return {
        "report": lambda: main(["report", str(folder)]),
        "compare": lambda: main(["compare", str(folder), str(folder)]),
        "plan": lambda: main(["sweep", "plan", "--scenarios", "tiny", "--num-gpus", "8"]),
        "dry run": lambda: benchmark(dry_run.split()),
        "log": lambda: show_lines(closing_lines(refit, run)),
        "search": lambda: main(["search", *SEARCH]),
        "bounds": lambda: main(["bounds", "tiny", "--cluster", "h100_ib400", "gb200_nvl72"]),
        "dispatchers": lambda: show_text(dispatcher_text(ARMS, table_width())),
        "trainers": lambda: show_text(trainer_text(TRAINERS, table_width())),
    }


ARMS = [*dispatched.runs_of("alltoall", 1.0, 1.2), *dispatched.runs_of("allgather", 1.1, 1.3)]
TRAINERS = [trained.outcome("megatron", 2.0), trained.outcome("fsdp2", 3.0)]
SEARCH = ["--model", "tiny", "--source", "TP4 EP8", "--gpus", "8", "--cluster", "h100_ib400"]


def show_lines(lines: list[str]) -> None:
    for line in lines:
        show_text(line)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["report", "compare", "plan", "dry run", "log"])
def test_no_line_is_wider_than_the_terminal(
    command: str, columns: int, tmp_path: Path, on_terminal: Callable[[int, Callable[[], object]], str]
) -> None:
    full_run(tmp_path)
    shown = on_terminal(columns, commands(tmp_path)[command]).split("\n")
    lines = [ESCAPE.sub("", line.rpartition("\r\x1b[2K")[2]) for line in shown]  # what was erased is not seen
    assert len(lines) > 8
    assert [line for line in lines if len(line) > columns] == []
    assert max(map(len, lines)) > 60, "the terminal's width is used"


TABLES = ("report", "compare", "plan", "search", "bounds", "dispatchers", "trainers")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", TABLES)
def test_lines_of_tables_are_not_broken(
    command: str,
    columns: int,
    tmp_path: Path,
    on_terminal: Callable[[int, Callable[[], object]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each line of each table is one on the terminal, and no name that leaves half of the line free is cut."""
    full_run(tmp_path)
    rendered: list[str] = []
    names: set[str] = set()
    table = grid._table

    def recorded(columns: Any, rows: Any, widths: Any) -> str:
        rendered.extend((text := table(columns, rows, widths)).split("\n"))
        names.update(word for row in rows for word in row[0].split())
        return text

    monkeypatch.setattr(grid, "_table", recorded)
    shown = on_terminal(columns, commands(tmp_path)[command])
    lines = {ESCAPE.sub("", line.rpartition("\r\x1b[2K")[2]) for line in shown.split("\n")}
    assert rendered
    assert {line.rstrip() for line in rendered} <= {line.rstrip() for line in lines}
    words = {word for line in lines for word in line.split()}
    assert {name for name in names if len(name) <= columns // 2} <= words


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", ["report", "compare", "plan", "dry run", "log"])
def test_files_are_plain_with_one_statement_a_line_and_tables_that_fit(
    command: str, columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_run(tmp_path)
    monkeypatch.setenv("COLUMNS", columns)  # a terminal's width, which says nothing about a file
    commands(tmp_path)[command]()
    text = capsys.readouterr().out
    assert not ESCAPE.search(text)
    in_columns = [line for line in text.splitlines() if len(re.findall(r"\S {2,}\S", line)) > 3]
    assert all(len(line) <= FILE_WIDTH for line in in_columns)
    assert command == "report" or in_columns


def test_colours_mark_verdicts_on_terminals_only(
    tmp_path: Path, on_terminal: Callable[[int, Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_run(tmp_path)
    report = commands(tmp_path)["report"]
    text = on_terminal(120, report)
    assert "\x1b[1;31mWRONG\x1b[0m" in text
    assert re.search(r"\x1b\[32mPASSED\x1b\[0m", text)
    assert re.search(r"\x1b\[1m[\d.]+ ms median\x1b\[0m", text)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in on_terminal(120, report)
    monkeypatch.setenv("TERM", "dumb")
    assert not ESCAPE.search(on_terminal(120, report))


def test_tables_for_programs_are_not_touched_on_a_terminal(
    tmp_path: Path, on_terminal: Callable[[int, Callable[[], object]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    full_run(tmp_path)
    for form in ("csv", "json", "markdown"):
        argv = ["report", str(tmp_path), "--format", form]
        assert main(argv) == 0
        assert on_terminal(80, lambda argv=argv: main(argv)) == capsys.readouterr().out


def test_the_width_is_that_of_columns_or_of_the_terminal(
    on_terminal: Callable[[int, Callable[[], object]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def print_width() -> None:
        show(str(table_width()))

    assert [on_terminal(columns, print_width) for columns in (100, 0, 7)] == ["100\n", "80\n", "40\n"]
    for asked, width in (("90", "90\n"), ("x", "100\n"), ("", "100\n"), ("9" * 5000, "100\n")):
        monkeypatch.setenv("COLUMNS", asked)
        assert on_terminal(100, print_width) == width
    assert table_width(io.StringIO()) == FILE_WIDTH


@given(st.lists(st.text("ab/-_.", min_size=1, max_size=60), min_size=1), st.integers(40, 130))
def test_words_stay_whole_and_none_is_lost(words: list[str], width: int) -> None:
    lines = wrapped(" ".join(words), width).split("\n")
    assert " ".join(lines).split() == words
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)


def test_the_rest_of_a_line_is_indented() -> None:
    assert wrapped("# a b c d", 6).split("\n") == ["# a b", "#   c", "#   d"]
    assert wrapped("  a b c d", 6).split("\n") == ["  a b", "    c", "    d"]


@pytest.mark.parametrize(
    "figure", ["66.64 GB", "102.4 %", "1.63 GB/s", "62.56 GiB", "63.0 M", "1.00 x", "61.5 ms median"]
)
def test_a_figure_stays_on_the_line_of_its_unit(figure: str) -> None:
    text = f"rank 64 receives {figure} between nodes"
    for width in range(20, 50):
        lines = wrapped(text, width).split("\n")
        assert sum(figure in line for line in lines) == 1
        assert max(map(len, lines)) <= width
        assert " ".join(line.strip() for line in lines) == text
    assert wrapped("it has 5 small parts", 8).split("\n")[:2] == ["it has 5", "  small"]


@settings(max_examples=30, deadline=None)
@given(st.integers(40, 200), st.text("ab_", min_size=1, max_size=120))
def test_a_table_of_any_width_keeps_every_cell(width: int, name: str) -> None:
    row = [name, *(str(1000 + number) for number in range(14))]
    text = fitted(TABLE, [row], width)
    assert max(map(len, text.split("\n"))) <= width
    assert all(text.count(cell) == 1 for cell in row[1:])
    tables = text.split("\n\n")
    assert all(table.startswith("scenario") for table in tables)
    assert [width > 170 + min(len(name), 16), len(tables) > 1] != [True, True]


def test_units_have_a_line_only_where_there_are_some() -> None:
    assert fitted([Column("a", is_text=True), Column("b")], [["x", "1"]]) == "a  b\nx  1"
    assert fitted([Column("a", is_text=True), Column("b", "(s)")], [["x", "1"]]) == "a    b\n   (s)\nx    1"
