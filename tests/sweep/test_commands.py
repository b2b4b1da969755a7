"""`refit sweep` and `refit place` as scripts use them: what goes to which stream, in which form, with which exit
code."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.commands import main
from refit.errors import UsageError
from refit.results.refit import EngineResult, RefitResult
from refit.results.result import Result, ResultFile
from refit.results.status import Status
from refit.results.sweep import Sweep
from tests.report.factories import timed, write_result

LINES = ["2:2:2:1:non-collocated:gloo:first", "1:1:1:1:collocated:shm:second", "4:2:4:1:non-collocated:gloo:large"]
CONFIGS = [word for line in LINES for word in ("--config", line)]
TINY = ["--", "--model", "tiny", "--split", "it's 99,1,0"]


def ok(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    found = main(argv)
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def begin(capsys: pytest.CaptureFixture[str], directory: Path, *options: str) -> Path:
    options = options or ("--run-id", "run")
    out = ok(capsys, "sweep", "begin", *CONFIGS, "--num-gpus", "8", "--output-dir", str(directory), *options, *TINY)
    return Path(out.rstrip("\n"))


def write_status(stem: str | Path, status: Status, **engines: EngineResult) -> None:
    """The result of an attempt that ended so."""
    measurements = {"refit": RefitResult(status=status, engines=engines)}
    path = Path(f"{stem}.json")
    run_id, _, name = path.stem.partition(".")[0].partition("_")
    scenario = Sweep.read(path.parent / f"{run_id}_sweep.json").scenario(name).scenario
    write_result(path, Result(path.stem, status=status, exit_code=0, scenario=scenario, measurements=measurements))


def pending(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> list[list[str]]:
    return [line.split("\t") for line in ok(capsys, "sweep", "pending", str(path), *options).splitlines()]


def stems(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> list[str]:
    return [Path(fields[3]).name for fields in pending(capsys, path, *options)]


def test_plan_prints_the_table_and_says_by_its_code_whether_all_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 ready, 1 refused" in ok(capsys, "sweep", "plan", *CONFIGS, "--num-gpus", "8", *TINY, code=2)
    assert "3 ready" in ok(capsys, "sweep", "plan", *CONFIGS, *TINY)
    assert "7 ready" in ok(capsys, "sweep", "plan", "--scenarios", "tiny", "--num-gpus", "8")


def test_begin_leaves_a_file_and_prints_its_path_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", "begin", *CONFIGS, "--title", "Small", "--num-gpus", "8", "--output-dir", str(tmp_path)]
    assert main([*argv, "--run-id", "run", "--job", "77", *TINY]) == 0
    captured = capsys.readouterr()
    path = tmp_path / "logs" / "run_sweep.json"
    assert captured.out == f"{path}\n"
    assert "large refused: 8 + 4 = 12 GPUs needed > 8 available" in captured.err
    sweep = Sweep.read(path)
    assert (sweep.run_id, sweep.title, sweep.jobs, sweep.nodes, sweep.num_gpus) == ("run", "Small", ("77",), 1, 8)
    assert [planned.status for planned in sweep.scenarios] == [Status.READY, Status.READY, Status.REFUSED]


def test_a_run_id_is_never_used_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(capsys, tmp_path)
    before = path.read_text()
    argv = ["sweep", "begin", *CONFIGS, "--num-gpus", "8", "--output-dir", str(tmp_path), "--run-id", "run", *TINY]
    assert "continue it with --resume run, or choose another --run-id" in error(capsys, *argv)
    assert path.read_text() == before
    dated = {begin(capsys, tmp_path, "--job", "5").name for _ in range(3)}
    assert len(dated) == 3
    assert all("_5" in name for name in dated)


def test_pending_lines_are_what_a_shell_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(capsys, tmp_path / "with space")
    lines = pending(capsys, path)
    assert [fields[:3] for fields in lines] == [["first", "1", "8"], ["second", "1", "8"]]
    stem = tmp_path / "with space" / "logs" / "run_first"
    assert lines[0][3] == str(stem)
    flags = lines[0][4:]
    run = parse(flags).scenario
    assert (run.title, run.output_dir, run.run_name) == ("TP2 EP2 -> TP2 EP1", stem.parent, "run_first")
    assert run.recorded == {"split": "it's 99,1,0"}


def test_the_cluster_goes_to_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(capsys, tmp_path, "--cluster", "h200_nvlink")
    assert "--cluster=h200_nvlink" in pending(capsys, path)[0][4:]


def test_what_is_pending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(capsys, tmp_path)
    first, second = path.parent / "run_first", path.parent / "run_second"
    write_status(first, Status.FAILED)
    write_status(second, Status.RUNNING)
    assert stems(capsys, path) == ["run_second.2"]
    assert stems(capsys, path, "--only", "failed") == ["run_first.2", "run_second.2"]
    write_status(f"{second}.2", Status.WAIVED)
    assert stems(capsys, path) == []
    assert stems(capsys, path, "--only", "failed") == ["run_first.2"]
    write_status(f"{first}.2", Status.WRONG_DATA)
    assert stems(capsys, path, "--only", "failed") == ["run_first.3"]
    write_status(f"{first}.3", Status.OK)
    assert stems(capsys, path, "--only", "failed") == []


def test_close_and_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(capsys, tmp_path)
    first, second = path.parent / "run_first", path.parent / "run_second"
    write_status(first, Status.OK, refit=timed([0.04523]))
    closing = ["sweep", "close", str(path)]
    assert ok(capsys, *closing, "first", "--stem", str(first), "--exit-code", "0") == (
        "first: TP2 EP2 -> TP2 EP1 over gloo: 45.2 ms median (1 refit), 48.1 GB/s, 0 of 2.00 M elements wrong\n"
    )
    Path(f"{second}.log").write_text("FAILED: rank 0 failed in phase 'build': no\n")
    line = ok(capsys, *closing, "second", "--stem", str(second), "--exit-code", "137")
    reason = "FAILED: ended with exit code 137 (killed by signal 9): rank 0 failed in phase 'build': no"
    assert line == f"second: TP1 EP1 -> TP1 EP1 collocated over shm: {reason}\n"
    text = ok(capsys, "sweep", "end", str(path), code=4)
    summary = path.parent / "run_summary.txt"
    assert text.splitlines()[-1] == f"Summary: {summary}"
    assert text.startswith(summary.read_text())
    assert "Mean refit time: 45.23 ms" in text


def test_close_of_a_timeout_and_of_a_stranger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(capsys, tmp_path)
    ending = ["--stem", str(path.parent / "run_first"), "--exit-code", "124", "--timed-out", "600"]
    line = ok(capsys, "sweep", "close", str(path), "first", *ending)
    assert line == "first: TP2 EP2 -> TP2 EP1 over gloo: FAILED: timed out after 600 s\n"
    assert "no scenario 'third': there are first, second, large" in error(
        capsys, "sweep", "close", str(path), "third", *ending
    )


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ((Status.OK, Status.OK), 0),
        ((Status.OK, Status.WAIVED), 0),
        ((Status.WAIVED, Status.WAIVED), 3),
        ((Status.OK, Status.FAILED), 4),
        ((Status.OK, None), 4),
        ((Status.OK, Status.RUNNING), 4),
        ((Status.FAILED, Status.WRONG_DATA), 1),
    ],
)
def test_the_exit_code_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], statuses: tuple[Status | None, ...], code: int
) -> None:
    argv = ["sweep", "begin", *CONFIGS[:4], "--num-gpus", "8", "--output-dir", str(tmp_path), "--run-id", "run", *TINY]
    path = Path(ok(capsys, *argv).strip())
    for name, status in zip(("first", "second"), statuses, strict=True):
        if status is not None:
            write_status(path.parent / f"run_{name}", status)
    ok(capsys, "sweep", "end", str(path), code=code)


def test_resume_checks_what_is_not_done_against_the_new_allocation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begin(capsys, tmp_path, "--run-id", "run", "--job", "77", "--cluster", "h200_nvlink")
    write_status(path.parent / "run_first", Status.OK)
    resume = ["sweep", "begin", "--resume", "run", "--output-dir", str(tmp_path), "--job", "78"]
    assert ok(capsys, *resume, "--num-gpus", "4") == f"{path}\n"
    sweep = Sweep.read(path)
    assert (sweep.jobs, sweep.num_gpus, sweep.nodes, sweep.cluster) == (("77", "78"), 4, 1, "h200_nvlink")
    assert [planned.status for planned in sweep.scenarios] == [Status.READY, Status.READY, Status.REFUSED]
    assert ok(capsys, *resume, "--num-gpus", "16") == f"{path}\n"
    assert [planned.status for planned in Sweep.read(path).scenarios] == [Status.READY] * 3
    assert Sweep.read(path).jobs == ("77", "78")
    assert stems(capsys, path) == ["run_second", "run_large"]


def test_wrong_selections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output-dir", str(tmp_path)]
    assert "no scenarios: give --config" in error(capsys, "sweep", "plan")
    assert "--num-gpus missing" in error(capsys, "sweep", "begin", *CONFIGS, *out, *TINY)
    assert "not allowed with" in error(capsys, "sweep", "plan", "--scenarios", "tiny", *CONFIGS)
    assert "run id 'a/b' cannot be part" in error(
        capsys, "sweep", "begin", *CONFIGS, *out, "--num-gpus", "8", "--run-id", "a/b", *TINY
    )
    assert "no sweep 'gone' in" in error(capsys, "sweep", "begin", "--resume", "gone", *out)
    assert "leave all others out" in error(capsys, "sweep", "begin", "--resume", "gone", *CONFIGS, *out)
    assert "cannot be read: No such file" in error(capsys, "sweep", "pending", str(tmp_path / "none.json"))
    assert "flags after -- mean nothing here: --model" in error(capsys, "sweep", "end", "x", *TINY)
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema_version": 1, "scenarios": [{}]}')
    assert f"{broken} is no sweep file of this benchmark (schema version 1, scenario 1: field" in error(
        capsys, "sweep", "end", str(broken)
    )
    broken.write_text('{"schema_version": 9, "scenarios": []}')
    assert "is no sweep file of this benchmark (schema version 9 is not one of 1 to 3): begin a new sweep" in error(
        capsys, "sweep", "end", str(broken)
    )


def placed(text: str) -> dict[str, list[str]]:
    """The values of each name that `place` printed."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition("\t")
        found.setdefault(name, []).append(value)
    return found


def test_place_says_what_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "tiny", "--refit-method", "nvshmem", "--tensor-model-parallel-size", "2", "--split", "it's"]
    sizes = [*flags, "--expert-model-parallel-size", "2", "--rl-inference-expert-model-parallel-size", "1"]
    found = placed(ok(capsys, "place", "--num-gpus", "8", "--", *sizes))
    assert found == {"num_ranks": ["6"], "nodes": ["1"], "ranks_per_node": ["8"], "note": [""], "flag": sizes}
    found = placed(ok(capsys, "place", "--gpus-per-node", "4", "--", *sizes))
    assert (found["nodes"], found["ranks_per_node"]) == (["2"], ["4"])
    found = placed(ok(capsys, "place", "--cpu-fallback", "--cluster", "h200_nvlink", "--", *sizes))
    assert (found["nodes"], found["ranks_per_node"]) == (["1"], ["6"])
    assert "shm stands in for nvshmem" in found["note"][0]
    assert found["flag"] == [*sizes, "--refit-method=shm", "--cluster=h200_nvlink"]


def test_a_result_of_another_scenario_is_named_and_not_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begin(capsys, tmp_path)
    first, second = path.parent / "run_first", path.parent / "run_second"
    write_status(second, Status.OK, refit=timed([0.01]))
    Path(f"{first}.json").write_text(Path(f"{second}.json").read_text())
    assert stems(capsys, path) == ["run_first.2"]
    assert main(["sweep", "begin", "--resume", "run", "--output-dir", str(tmp_path)]) == 0
    reason = "its result file is of another scenario: source.layout.tp 1, planned 2, "
    assert f"first: {reason}" in capsys.readouterr().err
    summary = ok(capsys, "sweep", "end", str(path), code=4)
    assert f"MISSING: {reason}" in summary
    assert "1 ok, 1 refused, 1 missing" in summary


def test_runs_of_each_scenario_are_interleaved_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", "begin", *CONFIGS, "--num-runs", "2", "--num-gpus", "8", "--output-dir", str(tmp_path)]
    assert main([*argv, "--run-id", "run", *TINY]) == 0
    captured = capsys.readouterr()
    assert "3 scenarios, 2 runs of each, interleaved, 8 GPUs" in captured.err
    assert "2 ready, 1 refused" in captured.err
    path = Path(captured.out.rstrip("\n"))
    assert stems(capsys, path) == ["run_first_run1", "run_second_run1", "run_first_run2", "run_second_run2"]
    for stem, seconds in (("first_run1", 0.1), ("second_run1", 0.2), ("first_run2", 0.11), ("second_run2", 0.2)):
        write_status(path.parent / f"run_{stem}", Status.OK, refit=timed([seconds]))
    ok(capsys, "sweep", "begin", "--resume", "run", "--output-dir", str(tmp_path))
    summary = ok(capsys, "sweep", "end", str(path), code=4)
    assert "first over gloo: 105.00 ms, median of 2 runs (100.00, 110.00), spread 9.5 %" in summary
    assert "second over shm: 200.00 ms, median of 2 runs (200.00, 200.00), spread 0.0 %" in summary
    assert "3 scenarios in 5 runs: 4 ok, 1 refused" in summary


def test_runs_have_names_and_a_number_that_are_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = [*CONFIGS[:2], "--config", "8:8:8:8:collocated:gloo:first_run2"]
    argv = ["sweep", "begin", *taken, "--num-gpus", "8", "--output-dir", str(tmp_path), "--num-runs"]
    assert "name 'first_run2' of run 2 of 'first' is taken" in error(capsys, *argv, "2", *TINY)
    assert "2 scenarios x 251 runs = 502, 500 are the most" in error(capsys, *argv, "251", *TINY)
    assert "leave all others out" in error(capsys, *argv[:2], "--resume", "x", *argv[8:], "2")


def test_ranks_on_cpus_need_no_number_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario of more than eight ranks, all on this machine."""
    lines = ["--config", "4:2:4:1:non-collocated:gloo:twelve", *CONFIGS[:2]]
    flags = ["--model", "tiny", "--num-layers", "1", "--moe-layer-freq", "1"]
    options = ["--cpu-fallback", "--output-dir", str(tmp_path), "--run-id", "run", "--", *flags]
    path = Path(ok(capsys, "sweep", "begin", *lines, *options).rstrip("\n"))
    assert [fields[:3] for fields in pending(capsys, path)] == [["twelve", "1", "12"], ["first", "1", "6"]]
    sweep = Sweep.read(path)
    assert (sweep.num_gpus, sweep.nodes) == (12, 1)
    ok(capsys, "sweep", "begin", "--resume", "run", "--cpu-fallback", "--output-dir", str(tmp_path))
    assert len(pending(capsys, path)) == 2


def test_place_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "tiny", "--refit-method", "nccl", "--tensor-model-parallel-size", "8"]
    assert "8 + 8 = 16 GPUs needed > 8 available" in error(capsys, "place", "--num-gpus", "8", "--", *flags)
    assert "--num-layers, --hidden-size" in error(capsys, "place", "--", "--refit-method", "nccl")
    for word in ("a\tb", "a\nflag\tb", "\x1b[2J"):
        message = error(capsys, "place", "--", *flags, "--split", word)
        assert f"{word!a} cannot go to a script" in message


def test_a_run_of_a_given_name_is_never_over_another(tmp_path: Path) -> None:
    paths = [ResultFile.create(tmp_path, "run_a.2").path.name for _ in range(3)]
    assert paths == ["run_a.2.json", "run_a.2-1.json", "run_a.2-2.json"]
    with pytest.raises(UsageError, match="--run-name: expected letters"):
        parse(["--model", "tiny", "--refit-method", "gloo", "--run-name", "../a"])


@pytest.mark.parametrize(
    "command",
    [
        ["report"],
        ["compare"],
        ["plot"],
        ["bounds"],
        ["outcome"],
        [],
        ["sweep"],
        ["sweep", "plan"],
        ["sweep", "begin"],
        ["sweep", "end"],
        ["place"],
    ],
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: refit" in capsys.readouterr().out
