"""Places of weights, as peers exchange them."""

from __future__ import annotations

import pickle

import torch

from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.transport.one_sided.places import Place


def test_a_peer_gets_the_place_that_was_sent() -> None:
    tensor = TensorSpec("experts", (8, 4, 6), "bfloat16", stacked=True, padded=True)
    place = Place(tensor, Box((2, 0, 3), (1, 4, 3)), torch.bfloat16, 640, (24, 6, 1), region=3)
    found = pickle.loads(pickle.dumps(place))
    assert found == place
    assert isinstance(found.tensor, TensorSpec)
    assert isinstance(found.box, Box)
