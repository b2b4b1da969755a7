"""What dry runs and searches say of refits that send changes, before one has run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.encodings.delta.find import pack_block, take_changes
from refit.encodings.delta.form import CPU_BLOCK, ENTRY_BYTES, expected_bytes, form_of
from refit.errors import UsageError
from refit.predict.cpus import Machine, check_running
from refit.predict.dry_run import DryRun, dry_run
from refit.predict.memory import check_memory
from refit.report.plans.dry_run import dry_run_text
from refit.report.plans.dry_run_json import dry_run_json
from refit.report.plans.search import as_json, as_text
from refit.sweep.search import Search

SIDES = "--model kimi_k2 --tensor-model-parallel-size 8 --expert-model-parallel-size 8"
KIMI_K2 = f"{SIDES} --rl-inference-expert-model-parallel-size 4 --dry-run --cluster h100_ib400 --refit-encoding delta"


def planned(line: str) -> DryRun:
    request = parse(line.split())
    assert request.dry_run is not None
    return dry_run(request.scenario, request.dry_run)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.3, 0.8])
def test_the_expected_bytes_are_those_that_packing_finds(share: float) -> None:
    generator = np.random.default_rng(0)
    num = 4 * CPU_BLOCK
    old = generator.integers(0, 1 << 16, num, np.uint16)
    new = np.where(generator.random(num) < share, old ^ 1, old)
    data, sent = np.empty(2 * CPU_BLOCK, np.uint8), 0
    for begin in range(0, num, CPU_BLOCK):
        block = slice(begin, begin + CPU_BLOCK)
        positions, values = take_changes(old[block], new[block])
        form = form_of(len(positions), CPU_BLOCK, 2)
        sent += ENTRY_BYTES + pack_block(form, positions.astype(np.uint16), values, new[block], data)
    assert expected_bytes(num, 2, share) == pytest.approx(sent, rel=0.1)


def test_each_share_has_its_bytes_and_bound() -> None:
    run = planned(f"{KIMI_K2} --delta-changed-share 1% --delta-changed-share 50%")
    one, half = run.changes
    assert (one.share, half.share) == (0.01, 0.5)
    assert 0.02 < one.wire_bytes / run.cost.wire_bytes < 0.021
    assert 0.56 < half.wire_bytes / run.cost.wire_bytes < 0.57
    assert run.bound is not None
    assert one.bound is not None
    assert half.bound is not None
    assert one.bound.seconds < half.bound.seconds < run.bound.seconds
    assert half.bound.seconds == pytest.approx(run.bound.seconds * half.wire_bytes / run.cost.wire_bytes, rel=0.01)
    text = dry_run_text(run)
    assert "1.0 % changed:" in text
    assert "at most 42.79 GB (2.0 %) between GPUs; lower bound 26.74 ms on h100_ib400: rank 64 receives" in text
    stored = json.loads(dry_run_json(run))["changes"]
    assert [row["wire_bytes"] for row in stored] == [one.wire_bytes, half.wire_bytes]


def test_comparing_bounds_what_links_do_not() -> None:
    """On links as fast as memory, a source reads twice what it would send."""
    run = planned(
        "--model tiny --tensor-model-parallel-size 4 --rl-inference-tensor-model-parallel-size 4 --dry-run "
        "--cluster h200_nvlink --refit-encoding delta --delta-changed-share 0.1%"
    )
    (changes,) = run.changes
    assert changes.bound is not None
    assert "reads and writes" in changes.bound.limited_by


def test_other_encodings_have_no_shares() -> None:
    assert planned(KIMI_K2.replace("--refit-encoding delta", "")).changes == ()


def test_a_snapshot_that_does_not_fit_is_refused_with_the_flag_that_moves_it() -> None:
    line = KIMI_K2.replace("--expert-model-parallel-size 8", "--expert-model-parallel-size 4", 1)
    with pytest.raises(UsageError) as raised:
        check_memory(planned(line))
    message = str(raised.value)
    assert "the source needs" in message
    assert "of weights and snapshot" in message
    assert "h100_ib400 has 80.00 GB: keep the snapshot in the host's memory with --delta-snapshot host, or " in message
    assert "\n" not in message
    check_memory(planned(f"{line} --delta-snapshot host"))


def test_the_flag_is_not_named_where_it_does_not_suffice() -> None:
    line = KIMI_K2.replace("--expert-model-parallel-size 8", "--expert-model-parallel-size 2", 1)
    with pytest.raises(UsageError) as raised:
        check_memory(planned(line))
    assert "--delta-snapshot" not in str(raised.value)


def test_snapshots_count_as_memory_of_the_cpus() -> None:
    flags = (
        "--model tiny --refit-method gloo --tensor-model-parallel-size 2 --rl-inference-tensor-model-parallel-size 1"
    )
    plain = parse(flags.split()).scenario
    delta = parse([*flags.split(), "--refit-encoding", "delta"]).scenario
    run = planned(f"{flags} --dry-run --refit-encoding delta")
    weights = sum(run.source_bytes.values()) + sum(run.destination_bytes.values()) + 2 * run.cost.wire_bytes
    machine = Machine(2, weights + run.cost.wire_bytes // 2)
    check_running(plain, machine)
    with pytest.raises(UsageError, match=r"of memory > .* free"):
        check_running(delta, machine)


def test_a_search_ranks_by_the_bound_of_changes() -> None:
    cluster = load_cluster("h100_ib400")
    found = {}
    for encoding in ("identity", "delta"):
        search = Search(
            common=("--model=tiny", f"--refit-encoding={encoding}"),
            source="TP2 EP2",
            source_gpus=8,
            destination_gpus=8,
            cluster=cluster,
            gpus_per_node=8,
        )
        found[encoding] = search.run()
    of_layouts = {one.destination: one for one in found["identity"].found}
    assert found["delta"].found[0].share == 0.01
    assert all(one.bound_s < 0.1 * of_layouts[one.destination].bound_s for one in found["delta"].found)
    assert "Sent:    what has changed, 1.0 % of the weights" in as_text(found["delta"], cluster, 3)
    assert "Sent:" not in as_text(found["identity"], cluster, 3)
    assert json.loads(as_json(found["delta"], cluster, 3))["found"][0]["share"] == 0.01
