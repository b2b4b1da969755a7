"""What runs in a pod: its command, its variables, the result in its log, and what it refuses to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from refit.errors import RefitError, UsageError
from refit.launch.kubernetes import pod
from refit.launch.kubernetes.pod import RESULT_LINE, environment, main, result_lines, result_of, wait_for_name


def arguments(folder: Path, rendezvous: str = "static", node: int = 1) -> list[str]:
    (folder / "flags").write_text("--model=tiny\n--source=a b\n")
    return [
        *("--nodes=2", "--ranks-per-node=8", f"--node={node}", "--master=localhost", "--port=29500"),
        *(f"--rendezvous={rendezvous}", "--address=10.0.0.2", "--id=run-a"),
        *(f"--folder={folder / 'out'}", "--result=run_a", f"--flags={folder / 'flags'}"),
    ]


@pytest.mark.parametrize(
    ("rendezvous", "expected"),
    [
        ("static", ["--node-rank=1", "--master-addr=localhost", "--master-port=29500"]),
        (
            "c10d",
            [
                *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29500", "--rdzv-id=run-a"),
                *("--rdzv-conf=is_host=0", "--local-addr=10.0.0.2"),
            ],
        ),
    ],
)
def test_a_pod_starts_torchrun_for_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rendezvous: str, expected: list[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(pod, "_run", lambda words, environ: started.append(list(words)) or 7)
    assert main(arguments(tmp_path, rendezvous)) == 7
    logs = f"--log-dir={tmp_path}/out/run_a_ranks/node1"
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=8"]
    assert started == [[*start, *expected, logs, "--tee=3", "-m", "refit.cli", "--model=tiny", "--source=a b"]]


def test_ranks_do_not_see_what_an_operator_sets_for_the_pod() -> None:
    given = {
        "RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "PET_NNODES": "2",
        "HOME": "/root",
    }
    found = environment({**given, "REFIT_NVSHMEM_LIBRARY": "/lib/nvshmem/host.so.3"})
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES"} & set(found)
    assert (found["HOME"], found["OMP_NUM_THREADS"]) == ("/root", "1")
    assert found["LD_PRELOAD"] == "/lib/nvshmem/host.so.3"
    assert environment({"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


def test_a_result_comes_back_from_the_lines_of_a_log() -> None:
    content = os.urandom(100_000)
    lines = list(result_lines(content))
    assert len(lines) > 5
    assert max(map(len, lines)) < 16 << 10
    parts = {int(found[1]): found[3] for line in lines if (found := RESULT_LINE.fullmatch(line))}
    assert result_of(parts, len(lines)) == content
    assert result_of({number: part for number, part in parts.items() if number != 3}, len(lines)) is None
    assert result_of({**parts, 3: parts[3][::-1]}, len(lines)) is None
    assert result_of({}, 0) is None


def test_the_first_pod_prints_the_result_and_overwrites_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: list[str], environ: dict[str, str]) -> int:
        (tmp_path / "out/run_a.json").write_text("{}")
        return 0

    monkeypatch.setattr(pod, "_run", run)
    assert main(arguments(tmp_path, node=0)) == 0
    assert capsys.readouterr().out.startswith("#refit-result 0 1 ")
    with pytest.raises(UsageError, match="is there already, and no result is overwritten"):
        main(arguments(tmp_path, node=0))


def test_a_first_pod_without_a_name_is_waited_for_and_named() -> None:
    wait_for_name("localhost", 0.0)
    with pytest.raises(RefitError, match=r"the first pod's name run-0.no-such-name.invalid has no address after 0 s"):
        wait_for_name("run-0.no-such-name.invalid", 0.0)
