"""Megatron-LM's text for pipeline layouts, and the layers of the chunks that it gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from refit.config.layout import Layout
from refit.config.pipeline_layout import PipelineLayout, pipeline_layout
from refit.errors import UsageError


@pytest.mark.parametrize(
    ("text", "sizes", "predictions"),
    [
        ("Et*4|t*4|t*3L", (4, 4, 3), (0, 0, 0)),
        ("E,t*3|(tt|)*2t,|tL", (3, 2, 2, 1, 1), (0,) * 5),
        ("Et|(t*2|)*3tmmL", (1, 2, 2, 2, 1), (0, 0, 0, 0, 2)),
        ("Et*3|(t*4|)*13t*4|t*2L", (3, *[4] * 14, 2), (0,) * 16),
        ("Et*3|(tt|)*29,m|L", (3, *[2] * 29, 0, 0), (*[0] * 30, 1, 0)),
        ("E||t|L", (0, 0, 1, 0), (0,) * 4),
        ("|Et|*2t|L|", (0, 1, 0, 1, 0, 0), (0,) * 6),
        ("E|(t|)*11m*3|L", (0, *[1] * 11, 0, 0), (*[0] * 12, 3, 0)),
    ],
)
def test_text_is_read(text: str, sizes: tuple[int, ...], predictions: tuple[int, ...]) -> None:
    assert pipeline_layout(text) == PipelineLayout(sizes, predictions)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tt|tL",
        "Et|t",
        "E|L",
        "Et|m|tL",
        "Et|tLL",
        "Et*3|xL",
        "Et|(t|*2L",
        "Et*9999|tL",
        "E|(t|)*11m|m|m|L",
        "(t" * 999,
    ],
)
def test_what_cannot_be_built_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pipeline layout"):
        pipeline_layout(text)


def test_the_remedy_for_prediction_layers_in_several_stages_is_read() -> None:
    with pytest.raises(UsageError, match="write mmm in one stage"):
        pipeline_layout("E|(t|)*11m|m|m|L")
    assert pipeline_layout("E|(t|)*11mmm|L").predictions[-2:] == (3, 0)


@given(
    chunks=st.lists(st.text("tm", max_size=3) | st.sampled_from(["t", "tt", "", "m"]), min_size=1, max_size=8),
    first=st.sampled_from(["E", "", "|E"]),
    last=st.sampled_from(["L", "", "L|"]),
    vpp=st.integers(1, 3),
)
@settings(max_examples=300)
def test_what_megatron_accepts_is_accepted_and_nothing_else(chunks: list[str], first: str, last: str, vpp: int) -> None:
    """Layouts are judged as the installed Megatron-Core judges them."""
    text = f"{first}{'|'.join(chunks)}{last}"
    num_stages, num_layers, mtp = text.count("|") + 1, text.count("t"), text.count("m")
    pp = num_stages // vpp
    if pp == 0 or pp * vpp != num_stages or (pp == 1 and vpp > 1) or not num_layers:
        return
    try:
        PipelineParallelLayerLayout(text, pp).validate_layer_layout(num_layers, mtp)
        theirs = True
    except AssertionError:
        theirs = False
    try:
        read = pipeline_layout(text)
        Layout(1, 1, 1, pp, pp, vpp=vpp, chunk_sizes=read.layers, chunk_predictions=read.predictions)
        ours = True
    except UsageError:
        ours = False
    assert ours is theirs


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
