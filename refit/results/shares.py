"""The refits of one engine by the share of the weights that was changed before them: one row for each share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from refit.config.registry import ENGINES
from refit.results.delta import Changed
from refit.results.refit import EngineResult, RefitResult, Sample


@dataclass(frozen=True, slots=True)
class ShareRow:
    """The measured refits of one share: medians of times, means of bytes of all ranks.

    `changed_share` is what was found to have changed, None where everything was sent. `move_s` is what finding, packing
    and applying leave of the time. `byte_share` and `speedup` compare with the full refits of the same run: None
    without these, or where either is in doubt.
    """

    asked_share: float | None
    num_refits: int
    num_full: int
    changed_share: float | None
    sent_bytes: float
    place_bytes: float
    value_bytes: float
    find_s: float
    pack_s: float
    move_s: float
    apply_s: float
    median_s: float
    byte_share: float | None
    speedup: float | None


@dataclass(frozen=True, slots=True)
class KindRow:
    """What optimizer steps before measured refits changed of one kind of tensor: shares of its elements."""

    kind: str
    num_elements: int
    mean: float
    least: float
    most: float


def kind_rows(refit: RefitResult) -> list[KindRow]:
    """A row for each kind, then one for `all`; empty where changes were made up."""
    tested = refit.tested
    deltas = [sample.delta for sample in tested.samples if not sample.warmup and sample.delta] if tested else []
    steps = [delta.by_kind for delta in deltas if delta.by_kind]
    if not steps:
        return []
    found = {kind: [step[kind] for step in steps if kind in step] for kind in steps[0]}
    return [
        _kind(kind, each) for kind, each in (*found.items(), ("all", [Changed.total(each.values()) for each in steps]))
    ]


def _kind(kind: str, steps: Sequence[Changed]) -> KindRow:
    shares = [step.share for step in steps]
    return KindRow(kind, steps[0].num_elements, statistics.mean(shares), min(shares), max(shares))


def full_refits(refit: RefitResult) -> EngineResult | None:
    """The refits of the same run that sent everything; None where there were none, or they are in doubt."""
    found = (each for name, each in refit.engines.items() if name in ENGINES and ENGINES[name].sends_everything)
    return next((each for each in found if each.summary and not each.doubt), None)


def share_rows(refit: RefitResult) -> list[ShareRow]:
    """Those of the engine under test, in the order in which the shares were given; empty where it sent no changes."""
    tested = refit.tested
    if tested is None:
        return []
    by_share: dict[float | None, list[Sample]] = {}
    for sample in tested.samples:
        if not sample.warmup and sample.delta is not None:
            by_share.setdefault(sample.delta.asked_share, []).append(sample)
    order = {share: place for place, share in enumerate(tested.asked_shares)}
    full = None if tested.doubt else full_refits(refit)
    wire_bytes = refit.plan.wire_bytes if refit.plan else 0
    return [_row(by_share[share], wire_bytes, full) for share in sorted(by_share, key=lambda each: order.get(each, -1))]


def _row(samples: Sequence[Sample], wire_bytes: int, full: EngineResult | None) -> ShareRow:
    deltas = [sample.delta for sample in samples if sample.delta is not None]
    known = [delta for delta in deltas if delta.num_changed is not None and delta.num_elements]
    changed = sum(delta.num_changed or 0 for delta in known)
    sent_bytes = statistics.mean(sample.sent_bytes or 0 for sample in samples)
    median_s = statistics.median(sample.seconds for sample in samples)
    moved = [
        max(0.0, sample.seconds - delta.find_s - delta.pack_s - delta.apply_s)
        for sample, delta in zip(samples, deltas, strict=True)
    ]
    return ShareRow(
        asked_share=deltas[0].asked_share,
        num_refits=len(samples),
        num_full=sum(delta.num_full > 0 for delta in deltas),
        changed_share=changed / sum(delta.num_elements for delta in known) if known else None,
        sent_bytes=sent_bytes,
        place_bytes=statistics.mean(delta.place_bytes for delta in deltas),
        value_bytes=statistics.mean(delta.value_bytes for delta in deltas),
        find_s=statistics.median(delta.find_s for delta in deltas),
        pack_s=statistics.median(delta.pack_s for delta in deltas),
        move_s=statistics.median(moved),
        apply_s=statistics.median(delta.apply_s for delta in deltas),
        median_s=median_s,
        byte_share=sent_bytes / wire_bytes if wire_bytes else None,
        speedup=full.median_s / median_s if full is not None and full.median_s and median_s else None,
    )
