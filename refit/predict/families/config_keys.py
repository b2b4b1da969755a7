"""Every key of config.json that is known: which flag has its value, which value is needed, which changes no weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from refit.config import yaml_files
from refit.config.shape import NORM_EPSILON, ROTARY_BASE
from refit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json, the flag with the same value and the attribute of ModelShape that holds it.

    Without an `optional` one the flag's default applies. `aliases` are other names of the same key.
    """

    name: str
    flag: str
    attribute: str
    optional: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Switch:
    """A key of config.json that is true or false, and the flag and the attribute of ModelShape that say the same."""

    name: str
    flag: str
    attribute: str


SIZES = (
    Key("num_hidden_layers", "num-layers", "num_layers"),
    Key("hidden_size", "hidden-size", "hidden_size"),
    Key("num_attention_heads", "num-attention-heads", "num_attention_heads"),
    Key("intermediate_size", "ffn-hidden-size", "ffn_hidden_size"),
    Key("vocab_size", "vocab-size", "vocab_size"),
    Key("max_position_embeddings", "max-position-embeddings", "max_position_embeddings", optional=True),
)
GROUPED_QUERIES = (
    Key("num_key_value_heads", "num-query-groups", "num_query_groups"),
    Key("head_dim", "kv-channels", "kv_channels"),
)
OPTIONAL_GROUPED_QUERIES = tuple(replace(key, optional=True) for key in GROUPED_QUERIES)
"""Without them every head has a key and a value of its own, and is hidden size / heads wide."""

LATENT = (
    Key("q_lora_rank", "q-lora-rank", "mla.q_lora_rank", optional=True),
    Key("kv_lora_rank", "kv-lora-rank", "mla.kv_lora_rank"),
    Key("qk_nope_head_dim", "qk-head-dim", "mla.qk_head_dim"),
    Key("qk_rope_head_dim", "qk-pos-emb-head-dim", "mla.qk_pos_emb_head_dim"),
    Key("v_head_dim", "v-head-dim", "mla.v_head_dim"),
)
ROUTED = (
    Key("num_experts_per_tok", "moe-router-topk", "experts.topk"),
    Key("moe_intermediate_size", "moe-ffn-hidden-size", "experts.ffn_hidden_size"),
)
LOCAL_EXPERTS = Key("num_local_experts", "num-experts", "experts.num_experts", aliases=("num_experts",))
EXPERTS = Key("num_experts", "num-experts", "experts.num_experts", aliases=("num_local_experts",))
STYLE: dict[str, object] = {
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "make-vocab-size-divisible-by": 1,
}
"""Flags that every family has."""

NUMERICS: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": NORM_EPSILON,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
}
"""Keys of config.json that both libraries' models are built with, whatever the model."""

REQUIRED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only --swiglu is built"),
    "attention_bias": (False, "the family has no name for these biases"),
    "topk_method": ("noaux_tc", "a router of deepseek_v3 has an expert bias"),
    "is_encoder_decoder": (False, "only decoders are built"),
    "add_cross_attention": (False, "only decoders are built"),
    "pruned_heads": ({}, "every layer is built with all heads"),
}
"""Keys with the one value that can be built, and why."""

BUILT_WITH: dict[str, tuple[Any, ...]] = {
    "rms_norm_eps": (NORM_EPSILON,),
    "rope_theta": (ROTARY_BASE,),
    "rope_scaling": (None,),
    "rope_parameters": (None, NUMERICS["rope_parameters"]),
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "routed_scaling_factor": (None, 1.0),
    "norm_topk_prob": (None, True),
    "use_sliding_window": (None, False),
    "scoring_func": (None, "sigmoid"),
    "rope_interleave": (None, True),
    "use_mrope": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "router_jitter_noise": (None, 0.0),
}
"""Keys that change no weight, and the values that the forward pass of both sides is built with."""

DTYPE_OF_FLAGS, BF16 = "weights have the dtype of the flags (--bf16)", (None, "auto", "bfloat16")
OTHER_WEIGHTS = {
    "num_nextn_predict_layers": ((None, 0), "its layers are left out, --mtp-num-layers builds them in Megatron"),
    "num_mtp_modules": ((None, 0), "its layers are left out, as in published checkpoints"),
    "quantization_config": ((None,), DTYPE_OF_FLAGS),
    "torch_dtype": (BF16, DTYPE_OF_FLAGS),
    "dtype": (BF16, DTYPE_OF_FLAGS),
}
"""Keys whose weights are built otherwise than config.json says: values that ask for nothing, and what is done."""

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Values in `layer_types` of layers with the same weights."""

LINEAR_ATTENTION = "linear_attention"
"""Value in `layer_types` of layers with a delta net, in families that have some."""

TYPES_BESIDE_NETS = {"full_attention", LINEAR_ATTENTION}
"""All values in those families: transformers builds their layers of another type without attention."""

_HARMLESS = """
    _attn_implementation _commit_hash _name_or_path architectures attention_dropout attn_implementation auto_map
    aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder label2id layer_types length_penalty max_length max_window_layers min_length
    model_type mtp_transformer_layers no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
    seq_aux sliding_window suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torchscript transformers_version typical_p use_bfloat16
    use_cache use_mtp
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys of tokens, losses, generation and files, and those that `config_json` reads by name."""


def whole(name: str, value: object, least: int = 1) -> int:
    """The value of the key `name`. Raises UsageError unless it is a whole number from `least`."""
    if type(value) is not int or value < least:
        raise UsageError(f"{name} must be a whole number from {least}, got {yaml_files.shortened(value)}")
    return value
