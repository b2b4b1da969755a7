"""A model from a provider: its sharding is gathered, planned and checked for coverage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refit.config.layout import Layout
from refit.errors import RefitError, UsageError
from refit.models.megatron.groups import build_groups
from refit.models.megatron.provider import build_from_provider, load_provider
from refit.models.megatron.sharding import read_weights
from refit.plan.planner import plan_refit
from refit.plan.sharding import RankSharding, Sharding
from tests.models.megatron.small import DENSE, built, layout, playing


def gathered(where: Layout) -> Sharding:
    """What every rank of the example's model states in this layout."""
    provider = load_provider("examples.custom_model:build")
    by_rank: dict[int, RankSharding] = {}
    for rank in where.ranks:
        with playing(rank, where.ranks.stop):
            model = build_from_provider(provider, where, build_groups(where), "cpu")
            assert model is not None
            by_rank[rank] = read_weights(model).rank_sharding
    return Sharding.from_ranks(by_rank)


def test_example_is_planned_between_two_layouts() -> None:
    source, destination = gathered(layout(tp=2, pp=2)), gathered(layout(tp=4, first=4))
    assert source.tensors["value_head.weight"].shape == (48, 64)
    assert len(source.by_key["value_head.weight"].shards) == 2
    assert len(destination.by_key["value_head.weight"].shards) == 4
    assert source.tensors["value_scale"].dtype == "float32"
    plan = plan_refit(source, destination)  # proves on construction that every element is written once
    assert int(plan.nbytes.sum()) == sum(destination.bytes_per_rank.values())
    assert set(plan.source.tolist()) == {0, 1, 2, 3}
    assert set(plan.destination.tolist()) == {4, 5, 6, 7}


def test_rank_outside_the_side_holds_nothing() -> None:
    where = layout(tp=2)
    with playing(3, 4):
        assert (
            build_from_provider(load_provider("examples.custom_model:build"), where, build_groups(where), "cpu") is None
        )


def test_several_chunks_are_read_together() -> None:
    """Two chunks of one rank, as interleaved stages give them: all keys of both, in eval mode."""
    halves = Layout(tp=1, ep=1, etp=1, pp=2, world_size=2)
    with playing(0, 2):
        first = built(DENSE, halves)
    with playing(1, 2):
        last = built(DENSE, halves)
        assert first is not None
        assert last is not None
        chunks = [first.module.train(), last.module]
        model = build_from_provider(lambda *_: chunks, halves, last.groups, torch.device("cpu"))
        assert model is not None
        keys = read_weights(model).rank_sharding.shards
    assert not chunks[0].training
    # Each chunk is built separately, so the first holds layers 0-1 and the second 2-3.
    assert {key.split(".")[2] for key in keys if ".layers." in key} >= {"2", "3"}
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(keys)
    with pytest.raises(UsageError, match="2 chunks"):
        _ = model.module


def test_provider_that_returns_too_few_chunks() -> None:
    where = layout(pp=2, vpp=2)
    with playing(0, 2), pytest.raises(RefitError, match=r"a list of 2 modules, .* it returned 1"):
        build_from_provider(lambda *_: torch.nn.Identity(), where, build_groups(where), "cpu")


def test_provider_that_returns_no_module() -> None:
    with playing(0, 1), pytest.raises(RefitError, match="it returned dict"):
        build_from_provider(lambda *_: {}, layout(), build_groups(layout()), "cpu")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("examples.custom_model", "not of the form module:function"),
        ("examples.no_such:build", "cannot be imported: No module named"),
        ("examples.custom_model:nothing", "cannot be imported: .*nothing"),
        ("examples.custom_model:VALUE_BINS", "names a int, not a function"),
    ],
)
def test_bad_provider_text(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load_provider(text)


def test_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_here.py").write_text("def build(layout, groups, device):\n    return layout\n")
    monkeypatch.chdir(tmp_path)
    assert callable(load_provider("my_model_here:build"))
