"""A dry run as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from refit import units
from refit.config.registry import ENCODINGS, IDENTITY
from refit.plan.cost import BusiestRank, per_gpu
from refit.predict.dry_run import Changes, DryRun
from refit.report.plans.bound_text import bound_text, estimate_text, floor_text
from refit.report.plans.expert_lines import expert_lines
from refit.report.plans.rank_map import rank_map
from refit.report.refits.delta_lines import percent

MAX_TABLE_RANKS = 16
"""Up to this many ranks, the table has one row per rank."""


def dry_run_text(run: DryRun) -> str:
    """Rank map, notes, figures and a table, as plain text without a newline at the end."""
    notes = [f"Note: {note}" for note in run.scenario.notes]
    table = _rank_table(run) if run.scenario.num_ranks <= MAX_TABLE_RANKS else _summary_table(run)
    ranks = rank_map(run.scenario, _num_ranks(run))
    return "\n".join([ranks, *notes, "", *_figures(run), "", *table, *expert_lines(run)])


def _figures(run: DryRun) -> list[str]:
    dtypes = " and ".join(dict.fromkeys(side.dtype.value for side in run.scenario.sides.values() if side.dtype))
    figures = {
        "GPUs needed": _gpus(run) + _nodes(run),
        "Model": f"{run.scenario.model_name or 'by flags'}, {units.count(run.num_parameters)} parameters "
        f"({run.num_parameters:,} with buffers) in {run.num_tensors:,} tensors, {dtypes}",
        **_memory(run),
        **_training(run),
        **(_moved(run) if "refit" in run.scenario.measurements else {}),
        "Planned in": f"{units.seconds(run.plan_s)}, rank shardings predicted in {units.seconds(run.predict_s)}",
    }
    width = max(map(len, figures)) + 1
    return [f"{label + ':':<{width}} {text}" for label, text in figures.items()]


def _moved(run: DryRun) -> dict[str, str]:
    """What a refit moves."""
    cost = run.cost
    shared = run.gpus.is_shared
    within = int(per_gpu(run.matrix, run.gpus).trace()) - cost.local_bytes if shared else 0
    sender, receiver = cost.busiest_sender, cost.busiest_receiver
    scenario = run.scenario
    sent = {} if scenario.encoding == IDENTITY else {"Encoding": _encoding(scenario.encoding)}
    return {
        **sent,
        "Payload": f"{units.gb(cost.payload_bytes)} in {cost.num_transfers:,} transfers",
        "Wire": f"{units.gb(cost.wire_bytes)} between "
        + (f"ranks, {units.gb(within)} of them on one GPU" if shared else "GPUs"),
        "Local": f"{units.gb(cost.local_bytes)} within a {'rank' if shared else 'GPU'}",
        "Busiest sender": f"{_busiest(run, sender, 'sent')}, {cost.sender_imbalance:.2f} x mean sender",
        "Busiest receiver": _busiest(run, receiver, "received"),
        **_between(run),
        "Lower bound": _lower_bound(run),
        **({"Estimate": estimate_text(run.estimate_s)} if run.estimate_s else {}),
        **_quantised(run),
        **({"Floor of all plans": floor_text(run.floor)} if run.floor else {}),
        **{f"{percent(each.share)} % changed": _changes(run, each) for each in run.changes},
    }


def _quantised(run: DryRun) -> dict[str, str]:
    """What an FP8 destination saves, and what crosses unquantised all the same."""
    other, quantisation = run.unquantised, run.scenario.destination.quantisation
    if other is None or quantisation is None:
        return {}
    dtype = other.scenario.destination.dtype
    name = dtype.value if dtype else "unquantised"
    less = 1 - run.cost.wire_bytes / other.cost.wire_bytes if other.cost.wire_bytes else 0.0
    bound = f"; lower bound {units.seconds(other.bound.seconds)}" if other.bound else ""
    lines = {
        f"With {name}": f"{units.gb(other.cost.wire_bytes)} between GPUs{bound}; {quantisation.dtype} sends "
        f"{percent(abs(less))} % {'less' if less >= 0 else 'more'}"
    }
    wire = next((wire for wire in run.wires.values() if hasattr(wire, "num_at_source")), None)
    if wire is not None:
        num_blocks = wire.num_at_source + wire.num_at_destination
        kinds = Counter(wire.reasons.values()).most_common()
        why = "; ".join(f"{text} ({number} tensors)" for text, number in kinds)
        lines[f"Sent as {quantisation.dtype}"] = f"{wire.num_at_source:,} of {num_blocks:,} blocks" + (
            f", the others as {name}: {why}" if why else ""
        )
    return lines


def _between(run: DryRun) -> dict[str, str]:
    """Bytes between nodes and within them, where there are several, with the plan's relay and without."""
    crossing = run.crossing
    if crossing is None:
        return {}
    lines = {
        "Between nodes": f"{units.gb(crossing.between_bytes)}, within them {units.gb(crossing.within_bytes)}, relay "
        f"{crossing.relay.value}; in every plan {units.gb(crossing.least_bytes)} cross"
    }
    other = run.without_relay
    if other is not None:
        bound = f"; lower bound {units.seconds(other.bound.seconds)}" if other.bound else ""
        lines["Without relay"] = (
            f"{units.gb(other.between_bytes)} between nodes, within them {units.gb(other.within_bytes)}{bound}"
        )
    return lines


def _changes(run: DryRun, changes: Changes) -> str:
    """`at most 1.39 GB (2.1 %) between ranks; lower bound 3.12 ms on h100_ib400: ...`."""
    wire = run.cost.wire_bytes
    text = f"at most {units.gb(changes.wire_bytes)}"
    text += f" ({percent(changes.wire_bytes / wire)} %)" if wire else ""
    cluster = run.options.cluster
    bound = f"; lower bound {bound_text(changes.bound, cluster)}" if cluster else ""
    return f"{text} between {'ranks' if run.gpus.is_shared else 'GPUs'}{bound}"


def _encoding(name: str) -> str:
    return f"{name}: {ENCODINGS[name].title}; the bytes below are those of a refit that sends everything"


def _num_ranks(run: DryRun) -> int:
    """Ranks of a job on all its GPUs. Where ranks share them, none is idle."""
    return run.scenario.num_ranks if run.gpus.is_shared else run.num_gpus


def _gpus(run: DryRun) -> str:
    """`4 + 4 = 8`; where ranks share GPUs `2, for 4 + 4 = 8 ranks`."""
    num_ranks = run.scenario.num_ranks_text
    if not run.gpus.is_shared:
        return num_ranks
    return f"{1 + max(map(run.gpus.gpu_of, range(run.scenario.num_ranks)))}, for {num_ranks} ranks"


def _nodes(run: DryRun) -> str:
    nodes = math.ceil(run.scenario.num_ranks / (run.options.gpus_per_node * run.scenario.ranks_per_gpu))
    return f" ({nodes} nodes of {run.options.gpus_per_node})" if nodes > 1 else ""


def _memory(run: DryRun) -> dict[str, str]:
    """Memory of the fullest GPU of each side, or of both sides together where they share GPUs."""
    staging = run.staging_bytes
    labels = {"both": "Memory per GPU", "source": "Memory per source GPU", "destination": "Memory per destination GPU"}
    fullest = {side: max(held.values()) for side, held in run.held_bytes.items()}
    return {
        labels[side]: f"{units.gib(nbytes + staging)} ({run.held_text(side)} {units.gib(nbytes)}, staging up to "
        f"{units.gib(staging)}){_too_much(run, nbytes + staging)}"
        for side, nbytes in fullest.items()
    }


def _training(run: DryRun) -> dict[str, str]:
    """What the fullest GPU of the source needs to train, an estimate."""
    if not run.training:
        return {}
    rank = max(run.training, key=lambda rank: run.training[rank].total_bytes + run.source_bytes[rank])
    needed = run.training[rank]
    parts = [
        ("weights", run.source_bytes[rank]),
        ("optimizer", needed.optimizer_bytes),
        ("gradients", needed.gradient_bytes),
        ("activations", needed.activation_bytes),
        *([("unsharded weights and gradient", needed.unsharded_bytes)] if needed.unsharded_bytes else []),
    ]
    total = needed.total_bytes + run.source_bytes[rank]
    texts = ", ".join(f"{name} {units.gib(nbytes)}" for name, nbytes in parts)
    if needed.step_bytes > needed.backward_bytes:
        texts += f"; {units.gib(needed.step_bytes)} at the optimizer's step, when activations are gone"
    return {"Training (estimate)": f"{units.gib(total)} on rank {rank}: {texts}"}


def _too_much(run: DryRun, nbytes: int) -> str:
    cluster = run.options.cluster
    if cluster is None or cluster.gpu_memory_bytes is None or nbytes <= cluster.gpu_memory_bytes:
        return ""
    return f", MORE THAN the {units.gib(cluster.gpu_memory_bytes)} of {cluster.name}"


def _busiest(run: DryRun, load: BusiestRank, direction: Literal["sent", "received"]) -> str:
    """`rank 64, 66.64 GB`, and how much of it crosses nodes where there are several."""
    traffic = run.traffic
    text = f"rank {load.rank}, {units.gb(load.nbytes)}"
    if run.scenario.num_ranks <= traffic.ranks_per_node:
        return text
    kinds = {
        "sent": (traffic.sent_within, traffic.sent_between),
        "received": (traffic.received_within, traffic.received_between),
    }
    within, between = (units.gb(int(nbytes[load.rank])) for nbytes in kinds[direction])
    return f"{text} ({within} within its node, {between} between nodes)"


def _lower_bound(run: DryRun) -> str:
    cluster = run.options.cluster
    if cluster is None:
        return "give the speeds of a cluster with --cluster"
    return bound_text(run.bound, cluster)


@dataclass(frozen=True, slots=True)
class _Column:
    """One figure of each rank, in units of `scale` bytes."""

    title: str
    loads: Mapping[int, int]
    scale: float

    def cell(self, value: float | None) -> str:
        return "-" if value is None else f"{value / self.scale:,.3f}"


def _columns(run: DryRun) -> list[_Column]:
    memory, moved = (
        (run.source_bytes, run.destination_bytes),
        (run.cost.sent_by_rank, run.cost.received_by_rank, run.cost.local_by_rank),
    )
    large = max(max(loads.values(), default=0) for loads in memory) >= 2**30
    held_unit, held_scale = ("GiB", 2.0**30) if large else ("MiB", 2.0**20)
    moved_unit, moved_scale = ("GB", 1e9) if large else ("MB", 1e6)
    columns = [
        *(
            _Column(f"{name} {held_unit}", loads, held_scale)
            for name, loads in zip(("source", "dest."), memory, strict=True)
        ),
        *(
            _Column(f"{name} {moved_unit}", loads, moved_scale)
            for name, loads in zip(("sent", "received", "local"), moved, strict=True)
            if "refit" in run.scenario.measurements
        ),
    ]
    return [column for column in columns if column.loads]


def _rank_table(run: DryRun) -> list[str]:
    columns = _columns(run)
    lines = [f"{'rank':>4}" + "".join(f"{column.title:>14}" for column in columns)]
    for rank in range(run.scenario.num_ranks):
        lines.append(f"{rank:>4}" + "".join(f"{column.cell(column.loads.get(rank)):>14}" for column in columns))
    return lines


def _summary_table(run: DryRun) -> list[str]:
    lines = [f"{'per rank':<12}{'min':>12}{'mean':>12}{'max':>12}{'at rank':>9}"]
    for column in _columns(run):
        values = column.loads.values()
        cells = "".join(f"{column.cell(x):>12}" for x in (min(values), sum(values) / len(values), max(values)))
        lines.append(f"{column.title:<12}{cells}{max(column.loads, key=column.loads.__getitem__):>9}")
    return lines
