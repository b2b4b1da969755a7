"""The result types of a running engine: what it is, what it was checked for, what its pause took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServedCheck:
    """Whether a running engine generates what a reference computes with the same weights, for `num_sets` in turn.

    `reference` says what computed it, and in which dtype the engine does. Log-probabilities of `num_tokens` tokens, of
    prompts and generated, may differ by `tolerance` nats; `difference` is the largest. A generated token is right where
    no other is likelier by more than twice the tolerance. `num_wrong` tokens are not. `num_excluded` more were left
    out, whose experts nearly tie with others. `skipped` is why there is no verdict.
    """

    passed: bool
    skipped: str | None = None
    reference: str = ""
    num_sets: int = 0
    num_tokens: int = 0
    num_excluded: int = 0
    num_wrong: int = 0
    difference: float | None = None
    tolerance: float | None = None
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
    """The running engine of a destination. Names of parameters have `*` for the layer.

    `live` parameters are written in the memory that the engine computes with. `copied` and `packed` ones are committed,
    which takes `commit_s` by kind of layer in the slowest worker: medians over measured refits.
    """

    version: str
    num_workers: int
    live: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    commit_s: dict[str, float] = field(default_factory=dict)
    pause_s: float | None = None
    check: ServedCheck | None = None
