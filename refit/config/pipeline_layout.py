"""Reads Megatron-LM's `--pipeline-model-parallel-layout`: which layers every pipeline stage holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from refit.config.limits import MAX_LAYERS
from refit.config.yaml_files import shortened
from refit.errors import UsageError

FORM = "`Et*4|t*4|t*3L`: stages apart by |, E the embedding, t a layer, m a prediction layer, L the output layer"


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """What every model chunk holds, in the order of the layers: decoder layers, and multi-token prediction layers."""

    layers: tuple[int, ...]
    predictions: tuple[int, ...]


def pipeline_layout(text: str) -> PipelineLayout:
    """The layers of every chunk: `(4, 4, 3)` for `Et*4|t*4|t*3L`. `(tt|)*3` repeats what is in the brackets, commas
    have no meaning, a chunk may be empty.

    The rules are those of Megatron-Core's `PipelineParallelLayerLayout` (0.16.1 and 0.19.2), which reads E and L as the
    first and the last letter only: the embedding is on the first chunk and the output layer on the last one, whatever
    the text says. Raises UsageError.
    """
    chunks = _expanded(text.replace(",", "").replace(" ", "")).split("|")
    if not re.fullmatch(r"Et+m*L", "".join(chunks)):
        raise UsageError(
            f"the pipeline layout {shortened(text, 60)} must have one E first, then each t, then each m, and one L "
            f"last, like {FORM}"
        )
    layout = PipelineLayout(*(tuple(chunk.count(letter) for chunk in chunks) for letter in "tm"))
    if sum(map(bool, layout.predictions)) > 1:
        number = sum(layout.predictions)
        raise UsageError(
            f"the pipeline layout {shortened(text, 60)} has its {number} prediction layers in "
            f"{sum(map(bool, layout.predictions))} stages, Megatron-Core builds all of them in one: "
            f"write {'m' * number if number < 9 else f'm*{number}'} in one stage"
        )
    return layout


def check_prediction_chunk(predictions: Sequence[int], pp: int) -> None:
    """Raise UsageError where prediction layers are in a chunk that is not the last one of its rank."""
    chunk = next((number for number, count in enumerate(predictions) if count), None)
    if chunk is not None and chunk < len(predictions) - pp:
        raise UsageError(
            f"the pipeline layout has prediction layers in stage {chunk}, chunk {chunk // pp} of "
            f"{len(predictions) // pp} on its rank, and Megatron-Core builds them in a rank's last chunk only: put m "
            f"in one of the last {pp} stages"
        )


def _expanded(text: str) -> str:
    """`text` with every repetition written out: brackets first, then single letters, as Megatron-Core does."""
    for pattern in (r"\(([^()]*)\)\*(\d{1,4})", r"([EtmL|])\*(\d{1,4})"):
        while re.search(pattern, text):
            text = re.sub(pattern, lambda match: match[1] * int(match[2]), text, count=1)
            if len(text) > 4 * MAX_LAYERS:
                raise UsageError(f"the pipeline layout has more than {MAX_LAYERS} layers")
    if not re.fullmatch(r"[Etm|L]+", text):
        raise UsageError(f"the pipeline layout {shortened(text, 60)} cannot be read: give {FORM}")
    return text
