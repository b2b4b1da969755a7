"""Damaged files: each is refused or skipped by name, the others are reported, and nothing ends in a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refit.commands import main
from refit.errors import UsageError
from refit.report.refits.page import Pictures, page
from refit.report.terminal.console import show
from refit.results.runs import find_run
from refit.results.status import Status
from tests.report.factories import planned, result, sweep_of, timed, write_result, write_run

GOLDEN = Path(__file__).parents[2] / "results" / "golden"
A, B = planned("A"), planned("B")

HOSTILE: list[Any] = [None, True, -1, 0, 10**400, -(10**30), 1e308, float("nan"), float("inf"), "", "x", "\ud800"]
HOSTILE += ["\x1b[2J", "=1+1", "../../x", "[/red]", "$\\frac", "9" * 300_000, [], {}, [None], {"a": 1}, [[[[[]]]]]]
COMMANDS = ("report", "markdown", "csv", "json", "samples", "page", "compare")
EXIT_CODES = (0, 1, 2, 4, 5)


def current() -> Any:
    """The newest kind of result, with a baseline and a bound."""
    from refit.results.result import encoded

    return json.loads(encoded(result(A, bound_s=0.04, baseline=timed((0.1, 0.2, 0.3)))))


def current_sweep() -> Any:
    from refit.results.result import encoded

    return json.loads(encoded(sweep_of([A, B], "run")))


DOCUMENTS = [json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("result_1", "result_2", "sweep_1")]
DOCUMENTS += [current(), current_sweep()]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the top; of lists and of figures by rank only the first two."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for number, (step, value) in enumerate(inner):
        if number > 1 and str(step).isdigit():
            break
        yield (*path, step)
        yield from places(value, (*path, step))


PLACES = [list(places(document)) for document in DOCUMENTS]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bool, str]:
    """Whether it is a sweep file, and the text of a real file with one to three values removed or replaced."""
    number = draw(st.integers(0, len(DOCUMENTS) - 1))
    content = copy.deepcopy(DOCUMENTS[number])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(PLACES[number]))
        change(content, place, draw(st.sampled_from([..., *HOSTILE])))
    text = json.dumps(content)
    cut = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, len(text))))
    return "scenarios" in DOCUMENTS[number], text[:cut]


def change(content: Any, place: tuple[Any, ...], value: Any) -> None:
    """Replace or, by `...`, remove a value; nothing where an earlier change took the place away."""
    holder = content
    try:
        for step in place[:-1]:
            holder = holder[step]
        if value is ...:
            del holder[place[-1]]
        elif isinstance(holder, list | dict):
            holder[place[-1]] = copy.deepcopy(value)
    except (KeyError, IndexError, TypeError):
        return


def run_command(command: str, folder: Path, whole: Path) -> int:
    if command == "compare":
        return main(["compare", str(whole), str(folder)])
    if command == "page":  # pictures have their own test
        return rendered(folder)
    words = {"report": ["text"], "samples": ["csv", "--samples"]}.get(command, [command])
    return main(["report", str(folder), "--format", *words])


def rendered(folder: Path) -> int:
    """The page without pictures: `refit report --format html` draws them too, which takes long."""
    try:
        show(page([find_run(folder)], [Pictures()]))
    except UsageError as error:
        return int(error.exit_code)
    return 0


@pytest.mark.slow
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged(), st.sampled_from(COMMANDS))
def test_no_damage_ends_in_a_traceback(tmp_path: Path, capsys: Any, content: tuple[bool, str], command: str) -> None:
    is_sweep, text = content
    folder, whole = tmp_path / "damaged", tmp_path / "whole"
    for each in (folder, whole):
        each.mkdir(exist_ok=True)
    write_result(whole / "A.json", result(A, bound_s=0.04))
    for file in folder.iterdir():
        file.unlink()
    (folder / ("run_sweep.json" if is_sweep else "one.json")).write_text(text)
    if is_sweep:
        write_result(folder / "run_A.json", result(A))
    assert run_command(command, folder, whole) in EXIT_CODES
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    shown = captured.out + captured.err
    assert not any(ord(character) < 32 and character != "\n" for character in shown)
    shown.encode()


DAMAGED = [
    "{",
    "[" * 100_000,
    '{"a": ' * 60 + "1" + "}" * 60,
    "null",
    json.dumps({**current(), "schema_version": 99}),
    json.dumps({**current(), "world_size": 10**400}),
    json.dumps({**current(), "measurements": {"refit": {"engines": {"refit": {"connect_s": float("nan")}}}}}),
    json.dumps({**current(), "run_id": "x" * 300_000}),
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_one_damaged_result_does_not_hide_the_others(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(tmp_path / "good.json", result(A))
    (tmp_path / "bad.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 4
    captured = capsys.readouterr()
    assert "Config: good" in captured.out
    assert captured.err.startswith(f"skipped {tmp_path / 'bad.json'}: is no result file of this benchmark (")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 700
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 4
    assert main(["report", str(tmp_path / "bad.json")]) == 2


def test_a_damaged_result_of_a_sweep_is_missing_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, sweep_of([A, B], "run"), {"A": result(A), "B": result(B)})
    (folder / "run_B.json").write_text('{"run_id": "x", "schema_version": 99}')
    run = find_run(folder)
    assert [outcome.status for outcome in run.outcomes] == [Status.OK, Status.MISSING]
    assert main(["report", str(folder), "--format", "csv"]) == 4
    assert capsys.readouterr().err.startswith(f"skipped {folder / 'run_B.json'}: is no result file")


def test_a_damaged_sweep_file_is_skipped_for_the_latest_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, sweep_of([A], "run"), {"A": result(A)})
    (tmp_path / "zzz_sweep.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 4
    assert f"skipped {tmp_path / 'zzz_sweep.json'}: is no sweep file" in capsys.readouterr().err
    (tmp_path / "run_sweep.json").write_text("[]")
    with pytest.raises(UsageError, match=r"none of 2 files can be read: .*run_sweep\.json: .*zzz_sweep\.json: "):
        find_run(tmp_path)


@pytest.mark.parametrize("name", ["../../outside", "a/b", "a\x1bb", "sweep"])
def test_names_of_a_sweep_stay_in_its_folder(name: str, tmp_path: Path) -> None:
    content = current_sweep()
    content["scenarios"][0]["name"] = name
    (tmp_path / "run_sweep.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is no sweep file"):
        find_run(tmp_path)


def test_a_folder_that_is_named_like_a_result_is_none(tmp_path: Path) -> None:
    write_result(tmp_path / "good.json", result(A))
    (tmp_path / "folder.json").mkdir()
    assert [outcome.planned.name for outcome in find_run(tmp_path).outcomes] == ["good"]


def test_damaged_results_are_skipped_in_pictures_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_result(tmp_path / "good.json", result(A))
    (tmp_path / "bad.json").write_text("{")
    assert main(["plot", str(tmp_path)]) == 4
    captured = capsys.readouterr()
    assert "times.png" in captured.out
    assert captured.err.startswith(f"skipped {tmp_path / 'bad.json'}: ")
