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
    """What all ranks counted in one refit. Elements and bytes are of what went between ranks."""

    asked_share: float | None
    """Share of the weights that was changed before it; None before the first refit, and where training changed them."""
    num_elements: int
    num_changed: int | None
    """None where any rank sent everything."""
    place_bytes: int
    """They say where changes are. What remains of the bytes sent are headers, tables and gaps."""
    value_bytes: int
    """They say what the changes are."""
    find_s: float
    """Of the rank that took longest, hidden beside the transfer or not."""
    pack_s: float
    """Of the rank that took longest. Where a GPU finds and packs at once, both are here."""
    apply_s: float
    """Of the rank that took longest."""
    snapshot_bytes: int
    """Of the rank with most."""
    num_full: int = 0
    """Ranks that sent everything."""
    full_because: str | None = None
    """Why the first of these did."""
    by_kind: dict[str, Changed] = field(default_factory=dict)
    """What the optimizer step before it changed of the whole source, by kind of tensor; empty where changes were made
    up, and before the first refit."""

    @property
    def changed_share(self) -> float | None:
        return None if self.num_changed is None or not self.num_elements else self.num_changed / self.num_elements
