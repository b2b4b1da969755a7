"""The result types of a running engine: what it is, what it was checked for, what its pause took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServedCheck:
    """Whether a running engine generates what a reference computes with the same weights, for `num_sets` in turn.

    A generated token is right where no other is likelier by more than twice the tolerance.
    """

    passed: bool
    skipped: str | None = None
    """Why there is no verdict."""
    reference: str = ""
    """What computed it, and in which dtype the engine does."""
    num_sets: int = 0
    """Sets of weights."""
    num_tokens: int = 0
    """Of prompts and generated."""
    num_excluded: int = 0
    """More tokens, left out since their experts nearly tie with others."""
    num_wrong: int = 0
    difference: float | None = None
    """The largest of log-probabilities, in nats."""
    tolerance: float | None = None
    """How much they may differ, in nats."""
    first_wrong: str | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong, in one sentence; None where nothing is, or nothing was compared."""
        if self.passed:
            return None
        where = f", first {self.first_wrong}" if self.first_wrong else ""
        return f"the engine's log-probabilities of {self.num_wrong} of {self.num_tokens} tokens are wrong{where}"


@dataclass(frozen=True, slots=True)
class Served:
    """The running engine of a destination. Names of parameters have `*` for the layer."""

    version: str
    """vLLM's."""
    num_workers: int
    live: tuple[str, ...] = ()
    """Parameters written in the memory that the engine computes with."""
    copied: tuple[str, ...] = ()
    """Parameters that the engine has to commit, in the order in which they are written."""
    packed: tuple[str, ...] = ()
    """Parameters that it commits in another order, or a library's own."""
    commit_s: dict[str, float] = field(default_factory=dict)
    """Of `copied` and `packed` ones, by kind of layer, in the slowest worker: medians over measured refits."""
    pause_s: float | None = None
    """How long it served nothing: the refit and the phases around it, median."""
    check: ServedCheck | None = None
    """None without `--check-forward`."""
