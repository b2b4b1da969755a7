"""Reading a live model: views onto its own storage, every element once, and an error otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from refit.config.shape import Dtype, ModelShape
from refit.errors import ShardingError
from refit.models.megatron.build import BuiltModel
from refit.models.megatron.sharding import canonical_key, persistent_buffers, read_weights
from tests.models.megatron.small import LATENT, MOE, SEQUENTIAL, built, fill, layout, playing, wrong


@pytest.fixture(params=[SEQUENTIAL, MOE, LATENT], ids=["sequential", "grouped", "latent"])
def model(request: pytest.FixtureRequest) -> Iterator[BuiltModel]:
    """Rank 3 of TP2 EP2 ETP2."""
    shape: ModelShape = request.param
    with playing(3, 4):
        made = built(shape, layout(tp=2, ep=2, etp=2, world=4), dtype=Dtype.BF16)
        assert made is not None
        yield made


def test_views_lie_in_their_owners(model: BuiltModel) -> None:
    for shard in read_weights(model):
        assert shard.view.shape == shard.box.extents
        storage = shard.owner.untyped_storage()
        assert shard.view.untyped_storage().data_ptr() == storage.data_ptr()
        assert storage.data_ptr() <= shard.view.data_ptr() < storage.data_ptr() + storage.nbytes()


def test_writing_views_writes_the_model(model: BuiltModel) -> None:
    """Fill through the views, then read the module: gate of expert 5 is where Megatron computes with it."""
    for parameter in model.module.parameters():
        parameter.data.fill_(torch.nan)
    memory = read_weights(model)
    fill(memory)
    assert not any(torch.isnan(parameter).any() for parameter in model.module.parameters())
    assert wrong(memory) == {}
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    experts = model.module.decoder.layers[1].mlp.experts
    grouped = hasattr(experts, "linear_fc1")
    live = experts.linear_fc1.weight1 if grouped else experts.local_experts[1].linear_fc1.weight
    gates = [shard for shard in memory if shard.tensor.key == key and shard.box.offsets == (5, 16, 0)]
    assert [shard.owner is live for shard in gates] == [True]
    assert torch.equal(gates[0].view[0], live[:16])


def test_expert_bias_stays_float32(model: BuiltModel) -> None:
    dtypes = {name: buffer.dtype for name, buffer in persistent_buffers(model.module)}
    assert dtypes == dict.fromkeys((f"decoder.layers.{i}.mlp.router.expert_bias" for i in (1, 2, 3)), torch.float32)
    shards = read_weights(model).rank_sharding.shards
    assert shards["decoder.layers.1.mlp.router.expert_bias"].tensor.dtype == "float32"
    assert shards["decoder.layers.1.input_layernorm.weight"].tensor.dtype == "bfloat16"


def test_views_rebind_to_storage_that_moves(model: BuiltModel) -> None:
    memory = read_weights(model)
    fill(memory)
    for parameter in model.module.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert memory.refresh()
    assert all(not shard.view.any() for shard in memory if isinstance(shard.owner, torch.nn.Parameter))


def test_parameter_left_out_is_named(model: BuiltModel) -> None:
    norm = model.module.decoder.final_layernorm
    original = model.module.sharded_state_dict
    model.module.decoder.layers[2].self_attention.register_parameter("forgotten", torch.nn.Parameter(torch.ones(3, 2)))

    def without_final_norm(**arguments: object) -> dict[str, object]:
        stated = original(**arguments)
        return {key: value for key, value in stated.items() if "final_layernorm" not in key and "forgotten" not in key}

    object.__setattr__(model.module, "sharded_state_dict", without_final_norm)
    with pytest.raises(ShardingError, match=r"2 parameters or persistent buffers") as caught:
        read_weights(model)
    assert f"decoder.final_layernorm.weight {list(norm.weight.shape)} is missing" in str(caught.value)
    assert "decoder.layers.2.self_attention.forgotten [3, 2] is missing" in str(caught.value)


def test_copy_is_refused(model: BuiltModel) -> None:
    original = model.module.sharded_state_dict

    def with_copy(**arguments: object) -> dict[str, object]:
        stated = original(**arguments)
        entry = stated["output_layer.weight"]
        entry.data = entry.data.detach().clone()
        return dict(stated)

    object.__setattr__(model.module, "sharded_state_dict", with_copy)
    with pytest.raises(ShardingError, match=r"output_layer.weight: its sharded_state_dict\(\) entry is a copy"):
        read_weights(model)


def test_part_stated_twice_is_named(model: BuiltModel) -> None:
    """The right number of elements, but half of them twice: counting elements does not find this."""
    original = model.module.sharded_state_dict

    def with_gate_for_up(**arguments: object) -> dict[str, object]:
        stated = dict(original(**arguments))
        factory = stated["decoder.layers.0.mlp.linear_fc1.weight"]
        gate, up = factory.build()
        up.data = gate.data
        stated["decoder.layers.0.mlp.linear_fc1.weight"] = [gate, up]
        return stated

    object.__setattr__(model.module, "sharded_state_dict", with_gate_for_up)
    with pytest.raises(
        ShardingError, match=r"layers.0.mlp.linear_fc1.weight \[96, 64\] is stated 6144 elements long, but"
    ):
        read_weights(model)


def test_tied_output_layer_is_one_tensor() -> None:
    with playing(0, 1):
        model = built(replace(MOE, tied_embeddings=True), layout())
        assert model is not None
        memory = read_weights(model)
    keys = [shard.tensor.key for shard in memory]
    assert keys.count("embedding.word_embeddings.weight") == 1
    assert "output_layer.weight" not in keys


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_bias", "decoder.layers.3.input_layernorm.bias"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.3.self_attention.linear_q_up_proj.layer_norm_weight",
            "decoder.layers.3.self_attention.q_layernorm.weight",
        ),
        ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
    ],
)
def test_canonical_keys(spelling: str, canonical: str) -> None:
    assert canonical_key(spelling) == canonical
