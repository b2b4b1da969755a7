"""The load format that an engine states, beside the prediction."""

from __future__ import annotations

import torch

from refit.models.vllm.engine.inside.refit_worker import digest, num_different
from refit.models.vllm.engine.layout import Held, Layout
from refit.predict.vllm.engine import Place
from refit.predict.vllm.parameters import Engines
from tests.predict.test_vllm import preset, side

BLOCKS = tuple(Engines(preset("tiny_qwen3_moe"), side()).blocks_of(Place(0, 0, 0, 0)))
PREDICTED = {f"{block.block.prefix}{one.name}": (one.shape, one.dtype) for block in BLOCKS for one in block.parameters}


def stated(**changed: object) -> Layout:
    return Layout.stated({"layout": {**PREDICTED, **changed}})


def test_the_predicted_layout_has_no_differences() -> None:
    assert stated().differences(BLOCKS) == []


def test_every_difference_is_named() -> None:
    layout = dict(PREDICTED)
    del layout["model.norm.weight"]
    layout["model.embed_tokens.weight"] = ((4096, 255), "float16")
    layout["model.extra"] = ((3,), "float32")
    assert Layout.stated({"layout": layout}).differences(BLOCKS) == [
        "model.embed_tokens.weight: [4096, 256] bfloat16 != [4096, 255] float16",
        "model.extra: absent != [3] float32",
        "model.norm.weight: [256] bfloat16 != absent",
    ]


def test_names_of_other_versions_are_the_same_parameters() -> None:
    layout = {name.replace("mlp.experts.routed_experts.", "mlp.experts."): held for name, held in PREDICTED.items()}
    assert Layout.stated({"layout": layout}).differences(BLOCKS) == []


def test_tensors_of_a_region_do_not_overlap() -> None:
    layout = Layout({"a": Held((3,), "bfloat16"), "b": Held((5, 7), "float32"), "c": Held((1,), "uint8")})
    assert layout.offsets == {"a": 0, "b": 64, "c": 256}
    assert layout.nbytes == 320


def test_a_digest_changes_with_any_bit_and_any_order() -> None:
    tensor = torch.randn(7, 33).to(torch.bfloat16)
    swapped, flipped = tensor.clone(), tensor.clone()
    swapped[0], swapped[1] = tensor[1], tensor[0]
    flipped.view(torch.uint8)[3, 5] ^= 1
    assert digest(tensor) == digest(tensor.clone())
    assert len({digest(tensor), digest(swapped), digest(flipped)}) == 3
    assert num_different(tensor, flipped) == 1
