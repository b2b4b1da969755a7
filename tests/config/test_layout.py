"""Which layers lie on which pipeline stage, in which model chunk."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.errors import UsageError


def stages(pp: int, vpp: int = 1, first: int | None = None, last: int | None = None) -> Layout:
    return Layout(tp=1, ep=1, etp=1, pp=pp, world_size=pp, vpp=vpp, first_stage_layers=first, last_stage_layers=last)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_chunks_in_the_order_of_a_pass_are_all_layers(
    pp: int, vpp: int, first: int, middle: int, last: int, even: bool
) -> None:
    """Microbatches go through the first chunk of every stage, then through the second: layers come in this order."""
    if even:
        layout, num_layers = stages(pp, vpp), pp * vpp * middle
    else:
        layout = stages(pp, vpp, first * vpp, last * vpp)
        num_layers = vpp * (first + last + (pp - 2) * middle)
    chunks = layout.chunk_layers(num_layers)
    assert [len(stage) for stage in chunks] == [vpp] * pp
    passes = (chunks[stage][chunk] for chunk in range(vpp) for stage in range(pp))
    assert list(itertools.chain(*passes)) == list(range(num_layers))
    assert [sum(map(len, stage)) for stage in chunks] == [len(layers) for layers in layout.stage_layers(num_layers)]


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="3 layers of pipeline stage 1 cannot be divided into 2 virtual stages"):
        stages(2, 2, first=2).chunk_layers(5)
    with pytest.raises(UsageError, match=r"2 virtual pipeline stages per rank need .* PP size is 1"):
        stages(1, 2)
