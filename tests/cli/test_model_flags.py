"""The flags of a model: Megatron-LM's defaults, what overrides a preset, what Megatron cannot build."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.shape import Dtype, LatentAttention
from tests.cli.lines import EP_REFIT, KIMI_K2_BY_FLAGS, TWO_HEADS, scenario, shape


def test_defaults_are_those_of_megatron() -> None:
    model = shape(TWO_HEADS)
    assert (model.ffn_hidden_size, model.kv_channels, model.num_query_groups) == (256, 16, 4)
    assert (model.normalization, model.position_embedding_type) == ("LayerNorm", "learned_absolute")
    assert (model.add_bias_linear, model.tied_embeddings, model.swiglu, model.experts, model.mla) == (
        True,
        True,
        False,
        None,
        None,
    )
    assert (model.vocab_size, model.make_vocab_size_divisible_by) == (32768, 128)
    assert shape("--num-layers 1 --hidden-size 1024 --num-attention-heads 8 --swiglu").ffn_hidden_size == 2688
    assert shape(f"{TWO_HEADS} --multi-latent-attention").mla == LatentAttention(None, 32, 128, 64, 128)
    assert shape(f"{TWO_HEADS} --group-query-attention").num_query_groups == 1
    assert shape(f"{TWO_HEADS} --num-query-groups 2").num_query_groups == 2
    experts = shape(f"{TWO_HEADS} --num-experts 8").experts
    assert experts is not None
    assert (experts.topk, experts.ffn_hidden_size, experts.shared_ffn_hidden_size) == (2, 256, None)


def test_style_flags() -> None:
    run = scenario(
        f"{TWO_HEADS} --fp32 --normalization RMSNorm --use-rotary-position-embeddings --disable-bias-linear "
        "--add-qkv-bias --untie-embeddings-and-output-weights --qk-layernorm --kv-channels 32 --padded-vocab-size 1000"
    )
    model = run.model
    assert model is not None
    assert [side.dtype for side in run.sides.values()] == [Dtype.FP32] * 2
    assert (model.normalization, model.position_embedding_type) == ("RMSNorm", "rope")
    assert (model.add_bias_linear, model.add_qkv_bias, model.tied_embeddings, model.qk_layernorm) == (
        False,
        True,
        False,
        True,
    )
    assert (model.kv_channels, model.padded_vocab_size(2)) == (32, 1000)


@pytest.mark.parametrize(
    ("frequency", "layers"),
    [
        ("1", (True, True, True, True)),
        ("2", (True, False, True, False)),
        ("([0]*1+[1]*3)", (False, True, True, True)),
        ("([0]+[1])*2", (False, True, False, True)),
        ("[0,1,1,1]", (False, True, True, True)),
    ],
)
def test_moe_layer_frequency(frequency: str, layers: tuple[bool, ...]) -> None:
    argv = ["--num-layers=4", "--hidden-size=64", "--num-attention-heads=4", "--num-experts=4", "--refit-method=gloo"]
    model = parse([*argv, "--moe-layer-freq", frequency]).scenario.model
    assert model is not None
    assert model.experts is not None
    assert model.experts.layers == layers


def test_flags_override_the_preset() -> None:
    run = scenario("--refit-method gloo --model tiny --num-layers 2 --moe-layer-freq 1 --fp32 --num-experts=4")
    model = run.model
    assert model is not None
    assert (model.num_layers, model.hidden_size, run.source.dtype) == (2, 256, Dtype.FP32)
    assert model.experts is not None
    assert (model.experts.num_experts, model.experts.layers) == (4, (True, True))
    assert run.model_name == "tiny"


def test_token_prediction_and_latent_experts() -> None:
    flags = f"{TWO_HEADS} --position-embedding-type rope --num-experts 4 --moe-latent-size 32"
    model = shape(f"{flags} --mtp-num-layers 2")
    assert (model.mtp_num_layers, model.experts and model.experts.latent_size) == (2, 32)
    assert shape(f"{flags} --mtp-num-layers 0") == shape(flags)


def test_biases_that_megatron_cannot_build_are_dropped_with_one_note() -> None:
    shared = scenario(f"{TWO_HEADS} --num-experts 4 --moe-shared-expert-intermediate-size 64")
    assert shared.model is not None
    assert not shared.model.add_bias_linear
    assert len(shared.notes) == 1
    assert "shared experts" in shared.notes[0]
    wide = scenario(f"{TWO_HEADS} --num-experts 4 --rl-inference-tensor-model-parallel-size 2")
    assert wide.model is not None
    assert not wide.model.add_bias_linear
    assert "ETP > 1 (here 2)" in wide.notes[0]
    plain = scenario(f"{TWO_HEADS} --num-experts 4")
    assert plain.model is not None
    assert plain.model.add_bias_linear
    assert plain.notes == ()


def test_experts_as_wide_as_the_dense_mlp_are_pointed_out() -> None:
    notes = scenario(KIMI_K2_BY_FLAGS).notes
    assert "each of 384 experts is as wide as the dense MLP, 18432: 6.19 T parameters" in notes[-1]
    assert "9.284 T parameters" in scenario(f"{KIMI_K2_BY_FLAGS} --swiglu").notes[-1]
    assert scenario(f"{EP_REFIT} --source-world-size 4 --destination-world-size 2").notes == ()
    assert scenario(f"{KIMI_K2_BY_FLAGS} --moe-ffn-hidden-size 2048 --disable-bias-linear").notes == ()


def test_a_model_of_the_users_own_has_no_shape() -> None:
    run = scenario("--model-provider package.module:build --refit-method gloo --tensor-model-parallel-size 2")
    assert (run.model, run.model_provider, run.source.layout.tp) == (None, "package.module:build", 2)
    assert [side.dtype for side in run.sides.values()] == [None, None]
