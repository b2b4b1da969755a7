"""Reads Megatron-LM's `--pipeline-model-parallel-layout`: which layers every pipeline stage holds."""

from __future__ import annotations

import re

from refit.config.limits import MAX_LAYERS
from refit.errors import UsageError

FORM = "`Et*4|t*4|t*3L`: stages apart by |, E the embedding, t a layer, m a prediction layer, L the output layer"


def chunk_sizes(text: str) -> tuple[int, ...]:
    """Decoder layers of every model chunk, in the order of the layers: `(4, 4, 3)` for `Et*4|t*4|t*3L`.

    `(tt|)*3` repeats what is in the brackets; commas have no meaning. As the models built here have it, the embedding
    is on the first chunk, output and prediction layers are on the last, and every chunk has a layer. Raises UsageError.
    """
    chunks = _expanded(text.replace(",", "").replace(" ", "")).split("|")
    first, last = chunks[0].count("E"), chunks[-1].count("L")
    ends = "".join(chunks).count("E") == first == 1 and "".join(chunks).count("L") == last == 1
    inner = [*chunks[:-1], re.sub(r"m*L$", "", chunks[-1])]
    inner[0] = inner[0].removeprefix("E")
    if not ends or not all(re.fullmatch(r"t+", chunk) for chunk in inner):
        raise UsageError(
            f"the pipeline layout {text!r} must have E first, m and L last and a t in every stage, like {FORM}"
        )
    return tuple(len(chunk) for chunk in inner)


def _expanded(text: str) -> str:
    """`text` with every repetition written out."""
    for pattern in (r"([EtmL])\*(\d{1,4})", r"\(([Etm|L]*)\)\*(\d{1,4})"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
        if len(text) > 4 * MAX_LAYERS:
            raise UsageError(f"the pipeline layout has more than {MAX_LAYERS} layers")
    if not re.fullmatch(r"[Etm|L]+", text):
        raise UsageError(f"the pipeline layout {text[:40]!r} cannot be read: give {FORM}")
    return text
