"""The process of a running engine, seen from the rank that starts it: start, ask, end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from refit.errors import RefitError, UnavailableError, UsageError

INSIDE = Path(__file__).with_name("inside")
"""The folder that the engine's processes import from; nothing else of this suite is on their path."""

WORKER = "refit_worker.RefitWorker"
STOP_S = 10.0
"""How long an engine may take to end once it was told to."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is in the process that is asked
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ON_DEVICE: dict[str, dict[str, str]] = {
    "cpu": {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else TP 2 is refused where there is one NUMA node
    },
    "cuda": {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
}
GENERIC = ("WorkerProc initialization failed", "EngineCore", "cancelled", "skip_tokenizer_init")
"""What vLLM says where the reason is in another process's log."""


class EngineError(RefitError):
    """The engine ended, or could not do what it was asked to."""


class EngineProcess:
    """A running engine. Only the rank that started it talks to it."""

    def __init__(self, python: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Start the engine with keyword arguments of `vllm.LLM`, and wait until it runs.

        Raises UsageError, with vLLM's own reason, where vLLM refuses the settings; EngineError where it ends.
        """
        ours, theirs = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the engine
        kept = without_ranks(os.environ)
        self._process = subprocess.Popen(
            [str(python), str(INSIDE / "host.py"), str(theirs.fileno()), str(os.getpid())],
            env={**kept, "PYTHONPATH": str(INSIDE), **ENVIRONMENT, **environment},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            self.facts: dict[str, Any] = self._ask("start", {"settings": dict(settings)})
        except _Refused as error:
            self.close()
            raise UsageError(f"vLLM does not start this engine: {error}") from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, method: str, **arguments: Any) -> Any:
        """What `method` of the engine's `Host` returns. Raises EngineError where it fails, or where the engine ends."""
        try:
            return self._ask(method, arguments)
        except _Refused as error:
            raise EngineError(f"vLLM failed in {method.replace('_', ' ')}: {error}") from None

    def close(self) -> None:
        """End the engine and its workers."""
        with contextlib.suppress(OSError):
            self._connection.send(("stop", {}))
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        # Then its workers, and last the tracker that removes the names of shared memory.
        with contextlib.suppress(ProcessLookupError):
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _ask(self, method: str, arguments: Mapping[str, Any]) -> Any:
        try:
            self._connection.send((method, dict(arguments)))
            outcome, value = self._connection.recv()
        except (EOFError, OSError):
            raise EngineError(self._ended(method)) from None
        if outcome == "error":
            raise _Refused(self._reason(value))
        return value

    def _ended(self, method: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        code = self._process.returncode
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        else:
            how = f"ended with exit code {code}" + (f": {told}" if (told := self._telling_line()) else "")
        return f"the vLLM engine (process {self.pid}) {how} before it answered to {method.replace('_', ' ')!r}"

    def _reason(self, told: str) -> str:
        """`told`, or where it names no cause, the first error in the log that does."""
        return (self._telling_line() or told) if any(word in told for word in GENERIC) else told

    def _telling_line(self) -> str | None:
        """What the first line of the log says that names an error and its cause, or a worker that died."""
        self._log.seek(0)
        for line in self._log.read().decode(errors="replace").splitlines():
            found = re.search(r"\b(?:\w*(?:Error|Exception): |Worker proc .* died unexpectedly).+", line)
            if found and " WARNING " not in line and not any(word in found[0] for word in GENERIC):
                return found[0]
        return None


class _Refused(Exception):
    """vLLM raised an error, and runs on."""


_RANKS_OWN = re.compile(
    "((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PYTHONPATH"
)


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would tell vLLM of this suite's ranks as its own: with TORCHELASTIC_USE_AGENT_STORE
    its worker would wait for a store that nobody starts."""
    return {name: value for name, value in environment.items() if not _RANKS_OWN.fullmatch(name)}


@contextlib.contextmanager
def model_folder(config: str) -> Iterator[Path]:
    """A folder with a config.json, which is all that an engine with dummy weights reads."""
    with tempfile.TemporaryDirectory(prefix="refit-vllm-") as folder:
        (Path(folder) / "config.json").write_text(config)
        yield Path(folder)


VERSION_CODE = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""


def installed_version(python: Path) -> str:
    """The version of vLLM in the environment of `python`. Raises UnavailableError where there is none."""
    try:
        command = [str(python), "-c", VERSION_CODE]
        # The paths of this process are not those of the other environment.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{python} is no Python that runs: {error}: make vllm sets one up") from None
    if ran.returncode != 0 or not ran.stdout.strip():
        raise UnavailableError(f"the environment of {python} has no vLLM: make vllm sets one up")
    return ran.stdout.strip()
