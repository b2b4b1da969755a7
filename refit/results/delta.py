"""What a refit that sends changes counts, as result files hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Changed:
    """Elements of one kind of tensor, each counted once, and how many of them a step has changed."""

    num_elements: int
    num_changed: int

    @property
    def share(self) -> float:
        return self.num_changed / self.num_elements if self.num_elements else 0.0

    @classmethod
    def total(cls, parts: Iterable[Changed]) -> Changed:
        held = list(parts)
        return cls(sum(part.num_elements for part in held), sum(part.num_changed for part in held))


@dataclass(frozen=True, slots=True)
class DeltaSample:
    """What all ranks counted in one refit. Elements and bytes are of what went between ranks.

    `asked_share` is the share of the weights that was changed before it; None before the first refit, and where
    training changed them. `num_full` ranks sent everything, `full_because` says why the first of these did. Where any
    did, `num_changed` is not known. `place_bytes` say where changes are, `value_bytes` what they are; what remains of
    the bytes sent are headers, tables and gaps. `find_s`, `pack_s` and `apply_s` are those of the rank that took
    longest, hidden beside the transfer or not; where a GPU finds and packs at once, both are in `pack_s`.
    `snapshot_bytes` are those of the rank with most. `by_kind` is what the optimizer step before it changed of the
    whole source, by kind of tensor; empty where changes were made up, and before the first refit.
    """

    asked_share: float | None
    num_elements: int
    num_changed: int | None
    place_bytes: int
    value_bytes: int
    find_s: float
    pack_s: float
    apply_s: float
    snapshot_bytes: int
    num_full: int = 0
    full_because: str | None = None
    by_kind: dict[str, Changed] = field(default_factory=dict)

    @property
    def changed_share(self) -> float | None:
        return None if self.num_changed is None or not self.num_elements else self.num_changed / self.num_elements
