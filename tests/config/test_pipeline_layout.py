"""Megatron-LM's text for pipeline layouts, and the layers of the chunks that it gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.config.pipeline_layout import chunk_sizes
from refit.errors import UsageError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("Et*4|t*4|t*3L", (4, 4, 3)),
        ("E,t*3|(tt|)*2t,m|tL".replace(",m", ""), (3, 2, 2, 1, 1)),
        ("Et|(t*2|)*3tmmL", (1, 2, 2, 2, 1)),
        ("Et*3|(t*4|)*13t*4|t*2L", (3, *[4] * 14, 2)),
    ],
)
def test_text_is_read(text: str, sizes: tuple[int, ...]) -> None:
    assert chunk_sizes(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "tt|tL", "Et|t", "E|tL", "Et|m|tL", "Et|tLL", "Et*3|xL", "Et|(t|*2L", "Et*9999|tL"]
)
def test_what_cannot_be_built_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pipeline layout"):
        chunk_sizes(text)


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12).filter(lambda sizes: len(sizes) % 2 == 0))
def test_chunks_hold_every_layer_once_in_the_order_of_the_passes(sizes: list[int]) -> None:
    vpp = len(sizes) // 2
    layout = Layout(tp=1, ep=1, etp=1, pp=2, world_size=2, vpp=vpp, chunk_sizes=tuple(sizes))
    chunks = layout.chunk_layers(sum(sizes))
    in_order = [chunks[stage][number] for number in range(vpp) for stage in range(2)]
    assert [len(chunk) for chunk in in_order] == sizes
    assert list(itertools.chain(*in_order)) == list(range(sum(sizes)))


def test_a_layout_of_other_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"3 stages, PP 2 x VPP 1 = 2"):
        Layout(tp=1, ep=1, etp=1, pp=2, world_size=2, chunk_sizes=(1, 1, 1))
    with pytest.raises(UsageError, match="has 3 layers, the model has 4"):
        Layout(tp=1, ep=1, etp=1, pp=2, world_size=2, chunk_sizes=(1, 2)).chunk_layers(4)
