"""What graphs have captured of a layer stays where it was when its processing makes it anew."""

from __future__ import annotations

import torch

from refit.models.vllm.engine.inside.refit_worker import Captured


class Packed(torch.nn.Module):
    """A layer whose processing packs its weight and makes a workspace, as vLLM's Marlin layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.process(torch.arange(8.0).view(2, 4))
        self.register_buffer("table", torch.zeros(2))

    def process(self, weight: torch.Tensor) -> None:
        packed = weight.view(torch.int32).t().contiguous()
        self.register_parameter("weight", torch.nn.Parameter(packed, requires_grad=False))
        self.workspace = torch.zeros(4, dtype=torch.int32)


def addresses(layer: Packed) -> list[int]:
    return [layer.weight.data_ptr(), layer.workspace.data_ptr(), layer.table.data_ptr()]


def test_what_is_made_anew_is_put_back_where_it_was() -> None:
    layer = Packed()
    captured, before = Captured.of(layer), addresses(layer)
    layer.workspace[0] = 5
    new = torch.arange(8.0, 16.0).view(2, 4)
    layer.process(new)
    assert addresses(layer)[:2] != before[:2]
    captured.put_back(layer)
    assert addresses(layer) == before
    assert torch.equal(layer.weight, new.view(torch.int32).t())
    assert int(layer.workspace[0]) == 0
    assert isinstance(layer.weight, torch.nn.Parameter)


def test_a_tensor_of_another_shape_is_left_as_it_was_made() -> None:
    layer = Packed()
    captured = Captured.of(layer)
    layer.process(torch.zeros(3, 4))
    captured.put_back(layer)
    assert layer.weight.shape == (4, 3)
