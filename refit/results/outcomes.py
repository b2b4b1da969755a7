"""What became of each scenario of a sweep, and its figures, whatever its result file holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refit.results.sweep import Planned, Status, Sweep, attempts

PEER = "megatron"
ENDED = ("ok", "wrong_data", "waived", "failed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A scenario and its last attempt.

    `status`: ok, wrong_data, failed, waived, refused, skipped or missing (never started, or interrupted). `reason` is
    None where it is ok. `result` is the result file's content. `log` is the name of the attempt's log, None without
    one.
    """

    planned: Planned
    status: str
    reason: str | None
    result: dict[str, Any] | None
    log: str | None = None

    @property
    def figures(self) -> Figures:
        return figures_of(self.planned, self.result or {})


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one engine measured. Seconds over the measured refits are None where it did not end.

    `samples_s` holds every measured refit, `warmup_s` those before them.
    """

    status: str
    reason: str | None
    mean_s: float | None
    min_s: float | None
    max_s: float | None
    median_s: float | None
    samples_s: tuple[float, ...]
    warmup_s: tuple[float, ...]
    gb_per_s: float | None
    num_compared: int
    num_wrong: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of one refit; `busiest_direction` is "sends" or "receives"."""

    payload: int
    wire: int
    local: int
    busiest: int
    busiest_rank: int | None
    busiest_direction: str | None


@dataclass(frozen=True, slots=True)
class Figures:
    """A scenario's figures: of the engine under test, of Megatron-Core's own where it ran beside it, and of the plan.

    `share` is the lower bound over the median, 0 to 1.
    """

    engine: EngineFigures | None
    peer: EngineFigures | None
    moved: Moved | None
    num_transfers: int | None
    lower_bound_s: float | None
    limited_by: str | None
    verify: str | None

    @property
    def median_s(self) -> float | None:
        return self.engine.median_s if self.engine else None

    @property
    def share(self) -> float | None:
        return self.lower_bound_s / self.median_s if self.lower_bound_s and self.median_s else None

    @property
    def peer_ratio(self) -> float | None:
        """The peer's median over that of the engine under test."""
        return self.peer.median_s / self.median_s if self.peer and self.peer.median_s and self.median_s else None


def load_outcomes(sweep: Sweep, directory: Path) -> list[Outcome]:
    """What became of every scenario of `sweep`, in its order, going by the last attempt in `directory`."""
    return [_outcome(sweep, planned, directory) for planned in sweep.scenarios]


def _outcome(sweep: Sweep, planned: Planned, directory: Path) -> Outcome:
    made = attempts(directory, sweep.run_id, planned.name)
    result = made[-1].result() if made else None
    log = made[-1].log.name if made and made[-1].log.exists() else None
    if planned.status is not Status.READY and (result is None or result.get("status") not in ENDED):
        return Outcome(planned, planned.status.value, planned.reason, result, log)
    if not made:
        return Outcome(planned, "missing", "it was not started", None)
    if result is None:
        return Outcome(planned, "missing", "it was interrupted before anything was written", None, log)
    return judged(planned, result, log)


def judged(planned: Planned, result: dict[str, Any], log: str | None = None) -> Outcome:
    """The outcome that a result file tells of."""
    status, failure = result.get("status"), result.get("failure") or {}
    engine = _under_test(result) or {}
    if status == "ok":
        return Outcome(planned, "ok", None, result, log)
    if status == "wrong_data":
        return Outcome(planned, "wrong_data", _what_is_wrong(engine), result, log)
    reason = _one_line(failure, engine)
    if status == "waived":
        return Outcome(planned, "waived", reason or "no reason was recorded", result, log)
    if failure or status == "failed":
        return Outcome(planned, "failed", reason or f"exit code {result.get('exit_code')}", result, log)
    measured = sum(not sample["warmup"] for sample in engine.get("samples", ()))
    return Outcome(planned, "missing", f"it was interrupted after {measured} measured refits", result, log)


def _one_line(failure: Mapping[str, Any], engine: Mapping[str, Any]) -> str:
    text = failure.get("message") or engine.get("reason") or ""
    where = [f"rank {failure['rank']}"] if failure.get("rank") is not None else []
    where += [f"phase {failure['phase']!r}"] if failure.get("phase") else []
    line = " ".join(str(text).split())
    return f"{', '.join(where)}: {line}" if where and line else line


def _what_is_wrong(engine: Mapping[str, Any]) -> str:
    compared, wrong = _checked(engine)
    if wrong:
        return f"{wrong:,} of {compared:,} elements wrong"
    agreement = (engine.get("forward") or {}).get("agreement")
    return "forward check failed" + (
        f": logits agree at {100 * agreement:.0f} % of tokens" if agreement is not None else ""
    )


def _under_test(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our engine, or the peer where it ran alone."""
    engines = result.get("engines") or {}
    return engines.get("refit") or engines.get(PEER)


def _checked(engine: Mapping[str, Any]) -> tuple[int, int]:
    samples = engine.get("samples", ())
    return sum(sample["num_compared"] for sample in samples), sum(sample["num_wrong"] for sample in samples)


def figures_of(planned: Planned, result: Mapping[str, Any]) -> Figures:
    """The figures in a result; bytes and bound come from the plan made before the run where the result has none."""
    engines, tested = result.get("engines") or {}, _under_test(result)
    bound = result.get("bound") or {}
    return Figures(
        engine=_engine(tested) if tested else None,
        peer=_engine(engines[PEER]) if tested is not engines.get(PEER) and PEER in engines else None,
        moved=_moved(planned, result.get("bytes") or {}),
        num_transfers=(result.get("plan") or {}).get("num_transfers"),
        lower_bound_s=bound.get("lower_bound_s", planned.lower_bound_s),
        limited_by=bound.get("limited_by", planned.limited_by),
        verify=(result.get("scenario") or {}).get("verify"),
    )


def _engine(engine: Mapping[str, Any]) -> EngineFigures:
    summary = engine.get("summary") or {}
    samples = [(bool(sample["warmup"]), max(sample["seconds_per_rank"])) for sample in engine.get("samples", ())]
    compared, wrong = _checked(engine)
    return EngineFigures(
        status=engine.get("status", "running"),
        reason=engine.get("reason"),
        mean_s=summary.get("mean_s"),
        min_s=summary.get("min_s"),
        max_s=summary.get("max_s"),
        median_s=summary.get("median_s"),
        samples_s=tuple(seconds for warmup, seconds in samples if not warmup),
        warmup_s=tuple(seconds for warmup, seconds in samples if warmup),
        gb_per_s=engine.get("bottleneck_gb_per_s"),
        num_compared=compared,
        num_wrong=wrong,
    )


def _moved(planned: Planned, moved: Mapping[str, Any]) -> Moved | None:
    if not moved:
        return Moved(**asdict(planned.bytes)) if planned.bytes else None
    received_first = (("received_by_rank", "receives"), ("sent_by_rank", "sends"))
    loads = [
        (nbytes, int(rank), direction)
        for key, direction in received_first
        for rank, nbytes in moved.get(key, {}).items()
    ]
    nbytes, rank, direction = max(loads, key=lambda load: load[0], default=(0, None, None))
    known = (rank, direction) if nbytes else (None, None)
    return Moved(moved["payload"], moved["wire"], moved["local"], moved["busiest"], *known)
