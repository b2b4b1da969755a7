"""What the tests of sides with a transformers model share: small runs, what a side should hold, one refit by hand."""

from __future__ import annotations

import torch

from refit.bench.engines.refit import PlannedEngine
from refit.bench.sides import Side
from refit.config.layout import Layout
from refit.config.scenario import Scenario
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.memory.weights import LocalWeights
from refit.plan.sharding import Sharding
from refit.predict.families.tables import families
from refit.predict.sides import plan_sides
from refit.results.refit import RefitResult
from refit.transport.ranks import Ranks
from tests.bench.test_runner import run_scenario
from tests.ranks.pool import RankPool

CPU = torch.device("cpu")
FAMILY = {family: f"tiny_{family.model_type}" for family in families()}
"""Each family and the preset of a small model."""

SMALL = ["--hidden-size=64", "--ffn-hidden-size=96", "--vocab-size=150", "--make-vocab-size-divisible-by=1"]
RUN = ["--refit-method=gloo", "--num-benchmark-warmup=1", "--num-benchmark-iterations=1", *SMALL]


def alone(dtype: Dtype) -> SideSpec:
    """A side on one rank."""
    return SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1), format="fsdp2", dtype=dtype)


def unlike(predicted: Sharding, rank: int, weights: LocalWeights) -> list[str]:
    """How the weights that `rank` holds differ from the prediction."""
    found = predicted.of_rank(rank).differences(weights.rank_sharding)
    return found if weights.nbytes == predicted.bytes_per_rank[rank] else [*found, f"{weights.nbytes} bytes held"]


def assert_verified(ranks: RankPool, flags: list[str]) -> None:
    """A run of these flags passes, and both sides give the same logits."""
    (answer, *_) = ranks.run(run_scenario, ["--fp32", "--check-forward", *RUN, *flags])
    result: RefitResult = answer.measurements["refit"]
    engine = result.engines["refit"]
    assert (answer.exit_code, engine.status, engine.num_wrong) == (0, "ok", 0)
    assert engine.forward is not None
    assert engine.forward.skipped is None
    assert engine.forward.agreement == 1.0


def refit_once(scenario: Scenario, source: Side, destination: Side) -> None:
    """One refit without the oracle. Collective: every rank of the job."""
    planned = plan_sides(source.sharding, destination.sharding, destination.spec, None)
    engine = PlannedEngine(scenario, CPU)
    engine.connect(planned, Ranks.of_default_group())
    program = engine.prepare(planned, source, destination)
    program.run()
    program.close()
