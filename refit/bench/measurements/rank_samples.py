"""What the ranks gather of one refit, as results keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from refit.bench.clock import Timing
from refit.bench.oracle import Verdict
from refit.encodings.delta.cpu import APPLY, FIND, PACK
from refit.models.vllm.engine.serving import Findings
from refit.predict.kinds import KINDS
from refit.results.delta import Changed, DeltaSample
from refit.results.refit import Sample, WrongWeights
from refit.transport.base import RunReport

MAX_WRONG_PER_RANK = 100
"""Most wrong tensors that a rank reports per iteration. Counts of wrong elements are always complete."""

NOTHING_FOUND = Findings(0)


@dataclass(frozen=True, slots=True)
class RankSample:
    """One rank's part of one refit, as gathered.

    `around_s`, `engine` and `apart_s` are of a running engine, on its first rank. `changed` is what an optimizer step
    before the refit changed of this rank's weights.
    """

    rank: int
    timing: Timing
    verdict: Verdict
    around_s: dict[str, float] = field(default_factory=dict)
    engine: Findings = NOTHING_FOUND
    apart_s: dict[str, float] = field(default_factory=dict)
    changed: dict[str, Changed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """A refit that sends changes: the `share` that was changed before it, None for none or one that nobody chose."""

    share: float | None


def sample_of(
    ranks: Sequence[RankSample], iteration: int, *, warmup: bool, packs: bool, asked: Asked | None = None
) -> Sample:
    """The refit of all ranks, with the phases of the slowest. `packs`: an encoding packs the messages. `asked`: it
    sends what has changed."""
    slowest = max(ranks, key=lambda each: each.timing.seconds)
    report, reports = slowest.timing.report, [each.timing.report for each in ranks]
    return Sample(
        iteration=iteration,
        warmup=warmup,
        seconds_per_rank=tuple(each.timing.seconds for each in ranks),
        slowest_rank=slowest.rank,
        phases_s=dict(report.phases_s),
        unattributed_s=slowest.timing.seconds - sum(report.phases_s.values()),
        num_compared=sum(each.verdict.num_compared for each in ranks),
        num_wrong=sum(each.verdict.num_wrong for each in ranks),
        beside_s=dict(report.beside_s),
        sent_bytes=sum(each.wire_bytes_sent for each in reports) if packs else None,
        most_sent_bytes=sum(each.most_wire_bytes_sent for each in reports) if packs else None,
        around_s={phase: seconds for each in ranks for phase, seconds in each.around_s.items()},
        apart_s={phase: seconds for each in ranks for phase, seconds in each.apart_s.items()},
        engine_compared=sum(each.engine.num_compared for each in ranks),
        engine_wrong=sum(sum(each.engine.wrong.values()) for each in ranks),
        delta=replace(_delta(reports, asked.share), by_kind=_by_kind(ranks)) if asked is not None else None,
    )


def _delta(reports: Sequence[RunReport], asked_share: float | None) -> DeltaSample:
    def total(name: str) -> int:
        return sum(each.counts.get(name, 0) for each in reports)

    def longest(phase: str) -> float:
        return max(each.phases_s.get(phase, 0.0) + each.beside_s.get(phase, 0.0) for each in reports)

    reasons = [f"rank {rank}: {each.remark}" for rank, each in enumerate(reports) if each.remark]
    return DeltaSample(
        asked_share=asked_share,
        num_elements=total("num_compared"),
        num_changed=None if reasons else total("num_changed"),
        place_bytes=total("place_bytes"),
        value_bytes=total("value_bytes"),
        find_s=longest(FIND),
        pack_s=longest(PACK),
        apply_s=longest(APPLY),
        snapshot_bytes=max(each.counts.get("snapshot_bytes", 0) for each in reports),
        num_full=len(reasons),
        full_because=reasons[0] if reasons else None,
    )


def _by_kind(ranks: Sequence[RankSample]) -> dict[str, Changed]:
    kinds = {kind for each in ranks for kind in each.changed}
    return {
        kind: Changed.total(each.changed[kind] for each in ranks if kind in each.changed)
        for kind in sorted(kinds, key=KINDS.index)
    }


def wrong_weights(ranks: Sequence[RankSample], iteration: int) -> list[WrongWeights]:
    """The first wrong weight of each wrong tensor, of every rank, then the parameters that are wrong in a running
    engine, by worker. A value that is NaN is left out."""
    found = []
    for each in ranks:
        for wrong in each.verdict.wrong[:MAX_WRONG_PER_RANK]:
            expected, actual = (
                None if math.isnan(value) else value for value in (wrong.first.expected, wrong.first.found)
            )
            found.append(
                WrongWeights(iteration, each.rank, wrong.key, wrong.num_wrong, wrong.first.index, expected, actual)
            )
        for (worker, name), count in list(each.engine.wrong.items())[:MAX_WRONG_PER_RANK]:
            found.append(WrongWeights(iteration, worker, f"in the engine: {name}", count, (), None, None))
    return found
