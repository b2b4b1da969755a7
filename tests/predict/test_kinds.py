"""The kinds of logical tensors."""

from __future__ import annotations

import pytest

from refit.predict.kinds import KINDS, OTHER, kind_of


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "output layer"),
        ("decoder.final_layernorm.weight", "norms"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "norms"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "attention"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "dense MLP"),
        ("decoder.layers.0.mlp.router.expert_bias", "router"),
        ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", "experts"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc2.weight", "shared experts"),
        ("mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight", "experts"),
        ("mtp.layers.0.eh_proj.weight", OTHER),
    ],
)
def test_a_key_has_the_kind_of_its_part(key: str, kind: str) -> None:
    assert kind_of(key) == kind
    assert kind in KINDS
